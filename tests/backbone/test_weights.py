"""Where weights come from, and what is said when they cannot be had."""

import copy
import os
import pickle
import time

import pytest
import timm
import torch
from safetensors.torch import save_file

from modmeta.backbone import Backbone
from modmeta.errors import ModmetaError


def test_random_weights_are_a_function_of_the_seed():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = Backbone("test_resnet", False, 32, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    prints = {seed: Backbone("test_resnet", False, 32, seed=seed).fingerprint() for seed in (1, 2)}
    assert first.fingerprint() == prints[1] != prints[2]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
@pytest.mark.parametrize("classes", [0, 7, 1000])
def test_loads_local_files_with_or_without_a_classifier(tmp_path, suffix, classes):
    model = timm.create_model("test_vit", num_classes=classes)
    path = tmp_path / f"weights{suffix}"
    save_file(model.state_dict(), path) if suffix == ".safetensors" else torch.save(model.state_dict(), path)
    backbone = Backbone("test_vit", str(path))
    tensors = model.state_dict()
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, tensors[name])
    assert "state_dict" not in backbone.model.pretrained_cfg


def test_loads_a_classifier_of_several_layers(tmp_path):
    model = timm.create_model("levit_128s", num_classes=7)
    torch.save(model.state_dict(), tmp_path / "levit.pth")
    tensors = Backbone("levit_128s", str(tmp_path / "levit.pth")).tensors()
    assert torch.equal(tensors["stem.conv1.linear.weight"], model.state_dict()["stem.conv1.linear.weight"])


def test_positions_are_resized_to_the_image_size(tmp_path):
    model = timm.create_model("test_vit", num_classes=0)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    assert Backbone("test_vit", str(tmp_path / "vit.pth"), 32).tensors()["pos_embed"].shape[1] == 5


def test_a_file_of_another_architecture_is_refused(tmp_path):
    path = tmp_path / "resnet.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    with pytest.raises(ModmetaError, match=r"does not fit backbone 'test_vit'.*\d+ missing \(first: .*unexpected"):
        Backbone("test_vit", str(path))
    tensors = timm.create_model("test_resnet").state_dict()
    del tensors["layer1.0.conv1.weight"]
    save_file(tensors, path)
    with pytest.raises(ModmetaError, match=r"1 missing \(first: layer1\.0\.conv1\.weight\)"):
        Backbone("test_resnet", str(path))


@pytest.mark.fault(39)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_broken_and_missing_files_are_refused_in_one_line(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    tensors = timm.create_model("test_vit").state_dict()
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[:1000])
    for file, text in ((path, "cannot read"), (tmp_path / f"none{suffix}", "does not exist")):
        with pytest.raises(ModmetaError, match=text) as caught:
            Backbone("test_vit", str(file))
        assert "\n" not in str(caught.value)


class Payload:
    """Pickles to a call that leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.fault(27)
def test_code_in_a_file_is_never_run(tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "weights.pth"
    torch.save({"state_dict": Payload(str(trace))}, path)
    with pytest.raises(ModmetaError, match="cannot read"):
        Backbone("test_vit", str(path))
    path.write_bytes(pickle.dumps(Payload(str(trace))))
    with pytest.raises(ModmetaError, match="cannot read"):
        Backbone("test_vit", str(path))
    assert not trace.exists()


def test_unknown_names_get_the_nearest():
    with pytest.raises(ModmetaError, match="did you mean 'resnet18'"):
        Backbone("resnet81", False)
    with pytest.raises(ModmetaError, match=r"did you mean 'resnet18\.a1_in1k'"):
        Backbone("resnet18.a1_in2k", False)


@pytest.mark.fault(39)
def test_a_hub_that_does_not_answer_is_one_line_at_once(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("modmeta.backbone.weights._cached", lambda name: None)
    begin = time.monotonic()
    with pytest.raises(ModmetaError, match=r"pass the path of a weight file.*pretrained: false") as caught:
        Backbone("test_resnet", True)
    assert time.monotonic() - begin < 10
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModmetaError, match="HF_HUB_OFFLINE is set"):
        Backbone("test_resnet", True)


def test_impossible_image_sizes_are_refused():
    for name, size in (("test_vit", 8), ("test_vit", 40), ("test_resnet", 0), ("test_resnet", -3)):
        with pytest.raises(ModmetaError, match="size"):
            Backbone(name, False, size)


@pytest.mark.fault(25)
def test_fingerprint_sees_what_matters_and_only_that(get):
    backbone = copy.deepcopy(get("test_efficientnet"))
    before = backbone.fingerprint()
    assert before.startswith("sha256:")
    backbone.requires_grad_(False).to(memory_format=torch.contiguous_format)
    assert backbone.fingerprint() == before
    backbone.model.get_buffer("bn1.running_mean")[0] += 1e-3
    assert backbone.fingerprint() != before
    assert Backbone("test_efficientnet", False, 64).fingerprint() != before
