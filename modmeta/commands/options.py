"""The options of every command, in the standard library alone, so that help and typos answer at once."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import NoReturn

from modmeta.errors import ModmetaError, nearest

_LIGHTNING_HELP = """\
usage: modmeta {name} --config FILE [--KEY VALUE ...]

{summary}

  --config FILE            a YAML file of the keys below, such as configs/quickstart.yaml; may be repeated
  --modules FILE.py        a file with your own adapter modules or learners; may be repeated
  --ckpt_path FILE         the checkpoint to {checkpoint}
{resume}  --name NAME              the run lies in runs/NAME/version_N; default: the name of the configuration file
  --test_after_fit BOOL    measure the test episodes after a fit
  --seed_everything INT    seed of everything that is random
  --model CLASS            the learner, such as ModularMetaLearner, or my_file.MyLearner with --modules
  --model.init_args.*      backbone.name, backbone.pretrained, units, head, source.epochs, steps, ...
  --data.*                 root, test_domains, image_size, ways, shots, eval_shots, ...
  --trainer.*              Lightning's Trainer: max_epochs, accelerator, devices, strategy, ...
  --print_config           print the resolved configuration and stop
  --help-all               every option with its type and default

The command line beats the configuration file, which beats what a checkpoint says.
A run's own config.yaml is accepted by fit, validate and test alike."""

_RESUME = """\
  --resume auto            go on with the run NAME in its folder, from its newest valid checkpoint, if it has any
  --resume PATH            go on with another run: one of its checkpoints, or its folder
                           (configuration, data and backbone must be those of the run; lengths, devices and paths may
                           change)
"""

_SUMMARIES = {
    "fit": ("Train on the source domains, then meta-train on episodes.", "begin a new run from"),
    "validate": (
        "Measure a checkpoint on the validation episodes.",
        "measure (its run's config.yaml is the default)",
    ),
    "test": ("Measure a checkpoint on the test episodes.", "measure (its run's config.yaml is the default)"),
}


def lightning_help(name: str) -> str:
    """Return the short help of ``fit``, ``validate`` or ``test``."""
    summary, checkpoint = _SUMMARIES[name]
    resume = _RESUME if name == "fit" else ""
    return _LIGHTNING_HELP.format(name=name, summary=summary, checkpoint=checkpoint, resume=resume)


COMPARE_HELP = """\
usage: modmeta compare --config FILE [--KEY VALUE ...]

Run any number of systems on the same frozen episodes and report their paired differences. The same command again
goes on where it stopped; systems may be added and episodes increased.

  --config FILE            a YAML file of the keys below, such as configs/compare/quickstart.yaml; may be repeated
  --modules FILE.py        a file with your own modules, learners or systems; may be repeated
  --manifest FILE          use the episodes.json of another comparison
  --report-only            measure nothing, report what was measured
  --checkpoints FILE       the checkpoint of a fit, or a mapping from each test domain to its own
  --systems.NAME.*         system: its registered name, and its options
  --episodes INT           draws per domain and number of shots
  --shots LIST             support images per class
  --flipped_labels SHARE   of the support labels turned into another class
  --unlabelled BOOL        give the systems no labels
  --reference NAME         the system that gains and harm are relative to
  --differences LIST       pairs of systems to compare; default: each with the reference
  --oracles.NAME LIST      the best of some systems per episode, in hindsight
  --best_constant.NAME LIST  the best of some systems per number of shots, in hindsight
  --data.*                 root, test_domains, image_size, ways, queries, cache_dir, ...
  --output DIR             the folder to write; default: runs/compare/ and the configuration's name
  --seed INT               seed of episodes, flipped labels and bootstrap
  --accelerator NAME       cpu or cuda
  --help-all               every option with its type and default"""


_CHECK_DESCRIPTION = """\
Check a folder of images before anything is learned from it. Writes check.html for people, check.json for programs
and manifest.jsonl with the hashes and the verdict of every file; changes nothing in DIR.

Exit code 2 means that there is an error: an image file that cannot be used, a folder that cannot be used (a class
without images, say), or the same pixels under two labels. Exit code 0 means that there is none; duplicates, links
that were passed over, an unbalanced domain and the like are warnings, suspicious labels are notes."""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line with the nearest right option."""

    def error(self, message: str) -> NoReturn:
        """Raise the user error for a wrong option."""
        found = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        if found:
            options = [option for action in self._actions for option in action.option_strings]
            close = nearest(found[1], options)
            raise ModmetaError(
                f"unknown option {found[1]}; " + (f"did you mean {close}?" if close else f"see {self.prog} --help")
            )
        raise ModmetaError(f"{message}; see {self.prog} --help")


def _parser(name: str, description: str) -> OneLineParser:
    parser = OneLineParser(prog=f"modmeta {name}", description=description, allow_abbrev=False)
    parser.add_argument(
        "--modules", metavar="FILE.py", action="append", default=[],
        help="a file with your own adapter modules or learners; may be repeated",
    )  # fmt: skip
    return parser


def adapt_parser() -> OneLineParser:
    """Return the parser of ``adapt``."""
    parser = _parser("adapt", "Adapt to the images of one folder and write an adapter file and its card.")
    parser.add_argument("--checkpoint", required=True, metavar="FILE.ckpt", help="what a fit wrote")
    parser.add_argument(
        "--support", required=True, metavar="DIR",
        help="folders of images, one per class; or images without labels, all in one folder",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="FILE.safetensors", help="the adapter file to write")
    parser.add_argument("--domain", metavar="NAME", help="name of the domain, for the card and as a hint")
    parser.add_argument(
        "--budget", type=float, metavar="X",
        help="share of the backward multiply-accumulates of steps on all learning units that may be taken, 0 to 1",
    )  # fmt: skip
    parser.add_argument(
        "--abstain-target", type=float, metavar="A",
        help="find the probability from which on held-out images are classified with accuracy A, 0 to 1, for "
        "predict --abstain-below calibrated; takes about as long as the adaptation again",
    )  # fmt: skip
    parser.add_argument(
        "--provenance", choices=("none", "hashes", "full"),
        help="what the adapter file and the card say of the images besides their number per class: nothing, salted "
        "hashes, or hashes and names; default: hashes, with --epsilon none",
    )  # fmt: skip
    parser.add_argument(
        "--epsilon", type=float, metavar="E",
        help="adapt with differential privacy of every image: the smaller, the more private and the less accurate; "
        "needs Opacus, see docs/privacy.md",
    )  # fmt: skip
    parser.add_argument("--delta", type=float, metavar="D", help="with --epsilon: its delta; default: 1e-5")
    parser.add_argument(
        "--clip", type=float, metavar="C", help="with --epsilon: largest norm of an image's gradient; default: 1"
    )
    parser.add_argument(
        "--explain", action="store_true",
        help="show what the policy saw and what each unit did, in the terminal, the card and a picture",
    )  # fmt: skip
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing adapter file")
    return parser


def predict_parser() -> OneLineParser:
    """Return the parser of ``predict``."""
    parser = _parser("predict", "Classify the images of a folder with an adapter file.")
    parser.add_argument("--checkpoint", required=True, metavar="FILE.ckpt", help="the checkpoint that was adapted")
    parser.add_argument("--adapter", required=True, metavar="FILE.safetensors", help="what adapt wrote")
    parser.add_argument("--images", required=True, metavar="DIR", help="searched with all its subfolders")
    parser.add_argument("--output", required=True, metavar="FILE.csv", help="the table to write")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: 32")
    parser.add_argument(
        "--abstain-below", default="0", metavar="P",
        help="mark images whose best class is less probable than P as abstained; `calibrated` takes the P that "
        "adapt --abstain-target found",
    )  # fmt: skip
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    return parser


def export_parser() -> OneLineParser:
    """Return the parser of ``export``."""
    parser = _parser("export", "Merge an adapter file into its backbone and write what needs no modmeta to run.")
    parser.add_argument("--checkpoint", required=True, metavar="FILE.ckpt", help="the checkpoint that was adapted")
    parser.add_argument("--adapter", required=True, metavar="FILE.safetensors", help="what adapt wrote")
    parser.add_argument(
        "--format", required=True, choices=("state_dict", "torch_export", "onnx"),
        help="tensors for timm.create_model (.safetensors), or a graph for torch.export (.pt2) or ONNX (.onnx)",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--input", choices=("uint8", "float32"), default="uint8",
        help="images that a graph takes: uint8 in 0..255 or float32 in 0..1; default: uint8",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.set_defaults(accelerator="cpu")
    return parser


def modules_parser() -> OneLineParser:
    """Return the parser of ``modules``."""
    parser = _parser("modules", "List the adapter modules and, for a backbone, where they act and what they cost.")
    parser.add_argument("--backbone", metavar="NAME", help="a timm model, here with random weights")
    parser.add_argument("--image-size", type=int, metavar="N", help="default: the model's own")
    parser.add_argument(
        "--units",
        metavar="FILE.yaml",
        help="a fit configuration, or a list of units, to resolve on the backbone",
    )
    return parser


def check_parser() -> OneLineParser:
    """Return the parser of ``check``."""
    parser = OneLineParser(
        prog="modmeta check", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_CHECK_DESCRIPTION,
    )  # fmt: skip
    parser.add_argument("folder", metavar="DIR", help="folders domain/class/image, or class/image of one domain")
    parser.add_argument(
        "--output", metavar="FOLDER", help="where to write the three files; default: check-NAME, NAME that of DIR"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier check")
    parser.add_argument(
        "--suspects", type=int, default=24, metavar="N", help="suspicious labels to show at most; default: 24"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="threads that decode; default: the cores, up to 4")
    parser.add_argument(
        "--backbone", metavar="NAME",
        help="judge labels by the features of this timm model instead of edges and colours; better, and slower",
    )  # fmt: skip
    parser.add_argument(
        "--pretrained", default="true", metavar="FILE|true",
        help="weights of the backbone: a file, or true for the published ones; default: true",
    )  # fmt: skip
    parser.add_argument("--image-size", type=int, metavar="N", help="of the backbone; default: the model's own")
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu", help="of the backbone; default: cpu")
    return parser


def tune_parser() -> OneLineParser:
    """Return the parser of ``tune``."""
    parser = _parser("tune", "Try settings of a fit configuration, each in a fit of its own, and keep the best one.")
    parser.add_argument("--config", required=True, metavar="FILE.yaml", help="the configuration of a fit")
    parser.add_argument(
        "--space", required=True, metavar="FILE.yaml",
        help="dotted keys of the configuration, each with {low: A, high: B}, and log: true or step: S if wanted, or a "
        "list of choices; see docs/search.md",
    )  # fmt: skip
    parser.add_argument(
        "--trials", type=int, default=20, metavar="N", help="fits in all; a study that has fewer goes on; default: 20"
    )
    parser.add_argument(
        "--metric", default="val/gain", metavar="NAME", help="what validation logs, to go by; default: val/gain"
    )
    parser.add_argument("--direction", choices=("maximize", "minimize"), default="maximize", help="default: maximize")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what to try; default: 0")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder of the study")
    return parser


def place_parser() -> OneLineParser:
    """Return the parser of ``place``."""
    parser = _parser("place", "Search which of a trained supernet's candidate modules to put where.")
    parser.add_argument("--checkpoint", required=True, metavar="FILE.ckpt", help="of a fit of a SupernetLearner")
    parser.add_argument(
        "--config", metavar="FILE.yaml",
        help="settings of the search: population, generations, budget, seed, data, ...; see docs/search.md",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="FILE.yaml", help="the units found, as a fit takes them")
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    return parser


PARSERS: dict[str, Callable[[], OneLineParser]] = {
    "check": check_parser,
    "tune": tune_parser,
    "place": place_parser,
    "adapt": adapt_parser,
    "predict": predict_parser,
    "export": export_parser,
    "modules": modules_parser,
}
