"""A frozen timm model that runs with replaced tensors, in parts, without ever being edited."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from modmeta.backbone.anatomy import FEATURES, Anatomy
from modmeta.backbone.apart import apart
from modmeta.backbone.cut import Cut
from modmeta.backbone.discovery import examine
from modmeta.backbone.fingerprint import fingerprint
from modmeta.backbone.four_block import BatchStatisticsNorm2d
from modmeta.backbone.pool import ShellPool
from modmeta.backbone.preprocessing import prepare, preprocessing_of
from modmeta.backbone.shell import Observer, Slot, call, hooked, resume_at, share, stop_at
from modmeta.backbone.site import Site
from modmeta.backbone.taps import tap
from modmeta.backbone.weights import create, first_line
from modmeta.errors import ModmetaError, unknown


class Backbone(nn.Module):
    """A timm model as a frozen feature extractor.

    The model stays in eval mode whatever ``train()`` is called on, and no gradient reaches its parameters
    through :meth:`run`, whether they require one or not. Only inside :meth:`trainable` can it be trained.

    Args:
        name: timm model name, with or without a weight tag.
        pretrained: True for timm's published weights, a path for a local ``.safetensors``, ``.pth``, ``.pt``
            or ``.bin`` file, False for random weights.
        image_size: height and width of the images in pixels; None for the model's default.
        seed: what random weights are a function of.
        taps: modules whose output the features hold, too: see :func:`modmeta.backbone.taps.tap`.

    Attributes:
        name: the name given.
        taps: the taps given.
        image_size: height and width of the images, in pixels.
        feature_dim: length of a feature vector.
        segments: lengths of its parts: the model's own features, and those of every tap.
        preprocessing: image size, mean, std, interpolation and crop share that the weights expect.

    Raises:
        ModmetaError: if the name is unknown, the size does not suit the model, or the weights cannot be had.
    """

    tap_scale: Tensor

    def __init__(
        self,
        name: str,
        pretrained: bool | str,
        image_size: int | None = None,
        seed: int = 0,
        taps: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if image_size is not None and image_size < 1:
            raise ModmetaError(f"image_size of backbone {name!r} is {image_size}; give a number of pixels")
        self.name = name
        self.model = create(name, pretrained, image_size, seed)
        self.preprocessing = preprocessing_of(self.model, image_size)
        self.image_size: int = self.preprocessing["image_size"]
        self._hosting = False  # whether the model itself is being trained
        self._shapes = {key: tensor.shape for key, tensor in self.tensors().items()}
        self._anatomy: Anatomy | None = None
        self._shells = ShellPool()
        self.own_dim: int = self._measure()
        self.taps = tuple(taps)
        tap(self.model, self.taps)
        self.feature_dim: int = self._measure() if self.taps else self.own_dim
        if self.taps:
            self.register_buffer("tap_scale", torch.ones(self.feature_dim - self.own_dim))

    # -- anatomy

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites, in execution order; found by running the model when first asked for."""
        return self._examined().sites

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """All verified cuts, in execution order; found by running the model when first asked for."""
        return self._examined().cuts

    @property
    def batch_dependent(self) -> bool:
        """Whether the features of an image depend on the other images of its batch."""
        return any(isinstance(module, BatchStatisticsNorm2d) for module in self.model.modules())

    def site(self, name: str) -> Site:
        """Return the site called ``name``.

        Raises:
            ModmetaError: if there is none.
        """
        return self._examined().site(name)

    def cut_before(self, names: Iterable[str]) -> str | None:
        """Return the last cut that lies before everything named.

        Args:
            names: sites, or full names of tensors.

        Returns:
            The name of a cut; ``"features"`` if only the features are named; None if the forward pass must
            start from the images.

        Raises:
            ModmetaError: if a name is neither a site nor a tensor.
        """
        return self._examined().cut_before(names, self._shapes)

    def macs(self, start: str | None = None) -> int:
        """Return the multiply-accumulates of all layers' weights behind the cut ``start``, per image."""
        return self._examined().macs(start)

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters and buffers of the model by name, detached."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: tensor.detach() for name, tensor in named}

    def fingerprint(self, calibrated: bool = True) -> str:
        """Return ``"sha256:..."`` over architecture, tensors, preprocessing and, if ``calibrated``, the taps' scale."""
        architecture = "+".join([self.name.partition(".")[0], *self.taps])
        scale = {"tap_scale": self.tap_scale} if self.taps and calibrated else {}
        return fingerprint(architecture, self.tensors() | scale, self.preprocessing)

    @torch.no_grad()
    def calibrate(self, features: Tensor) -> Tensor:
        """Set the scale of what the taps read: each channel varies alike, and each tap as much as the own features.

        Args:
            features: (N, D) of images as varied as those to come.

        Returns:
            The features under the new scale; as they were without taps.
        """
        if not self.taps:
            return features
        own, tapped = features[:, : self.own_dim], features[:, self.own_dim :] / self.tap_scale
        deviation = tapped.std(0, correction=0)
        share = (len(self.taps) / tapped.shape[1]) ** 0.5
        # A channel that hardly varies must not be blown up.
        floor = 0.1 * deviation.mean() + 1e-12
        self.tap_scale = own.std(0, correction=0).norm() * share / (deviation + floor)
        return torch.cat([own, tapped * self.tap_scale], dim=1)

    # -- forward

    def prepare(self, images: Tensor) -> Tensor:
        """Return images as the model wants them: normalised, on its device, in its dtype, channels last.

        Args:
            images: (B, 3, H, W), uint8 in 0..255 or float in 0..1.

        Raises:
            ModmetaError: if their shape or dtype is another one.
        """
        return prepare(images, self.preprocessing, next(self.model.parameters()))

    def run(
        self,
        x: Tensor,
        overlay: Mapping[str, Tensor] | None = None,
        *,
        start: str | None = None,
        stop: str | None = None,
        slots: Mapping[str, Slot] | None = None,
        observers: Mapping[str, Observer] | None = None,
    ) -> Tensor:
        """Run the model, or the part of it between two cuts, with some of its tensors replaced.

        What is given for modules outside of that part has no effect.

        Args:
            x: images (B, 3, H, W) as :meth:`prepare` takes them, or what a run with ``stop=start`` returned.
            overlay: replacements of parameters and buffers by full name, of the same shapes. Gradients of
                first and second order flow to them, and they may be batched by ``torch.func.vmap``.
            start: name of the cut to go on from; ``"features"`` to apply only the slot of the features.
            stop: name of the cut to stop at; ``"features"`` to leave out the slot of the features.
            slots: by site, a function of the module's input, its output, and the module itself as a function
                of any input, that gives a new output.
            observers: by site, a function of the module's input, called just before the module runs. The
                tensors it returns replace the module's own, by local name, for this call.

        Returns:
            Features (B, D), or the activations at ``stop``.

        Raises:
            ModmetaError: for an unknown tensor, site or cut, or a shape that does not fit.
        """
        overlay, slots, observers = overlay or {}, slots or {}, observers or {}
        self._check_overlay(overlay)
        if start != FEATURES:
            x = self._run_model(x, overlay, start, stop, slots, observers)
        elif stop not in (None, FEATURES):
            raise ModmetaError(f"start 'features' lies behind stop {stop!r}; swap them")
        if stop is not None:
            return x
        if FEATURES in observers:
            observers[FEATURES](x)
        return slots[FEATURES](x, x, lambda x: x) if FEATURES in slots else x

    def forward(self, images: Tensor, overlay: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the features (B, D) of ``images`` under ``overlay``: see :meth:`run`."""
        return self.run(images, overlay)

    # -- training the model itself

    @contextmanager
    def trainable(self) -> Iterator[Self]:
        """Put the model itself in train mode inside the context, for :meth:`train_forward`.

        ``requires_grad`` stays as it is: gradients reach the parameters that require one.
        """
        self._hosting = True
        self.model.train()
        try:
            yield self
        finally:
            self._hosting = False
            self.model.eval()

    def train_forward(self, images: Tensor) -> Tensor:
        """Return the model's own features (B, D) of ``images``, with gradients to its own parameters.

        Raises:
            RuntimeError: outside of :meth:`trainable`.
        """
        if not self._hosting:
            raise RuntimeError("train_forward trains the model itself; call it inside backbone.trainable()")
        features: Tensor = self.model(self.prepare(images))
        return features[:, : self.own_dim]

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this module; the model follows only inside :meth:`trainable`."""
        super().train(mode)
        if not self._hosting:
            self.model.eval()
        return self

    # -- inside

    def _run_model(
        self,
        x: Tensor,
        overlay: Mapping[str, Tensor],
        start: str | None,
        stop: str | None,
        slots: Mapping[str, Slot],
        observers: Mapping[str, Observer],
    ) -> Tensor:
        stop = None if stop == FEATURES else stop
        if start is None:
            x = self.prepare(x)
        else:
            self._examined().check(x, start, stop)
            if stop == start:
                return x
        slots = {name: slot for name, slot in slots.items() if name != FEATURES}
        observers = {name: observer for name, observer in observers.items() if name != FEATURES}
        if slots or observers:
            slots = self._examined().acting(slots, start, stop)
            observers = self._examined().acting(observers, start, stop)
        with (
            self._shells.lend((start, stop), lambda: self._build_shell(start, stop)) as shell,
            hooked(shell, slots, observers),
        ):
            output = call(shell, x, overlay, start, self.image_size)
        if stop is None and self.taps:
            return torch.cat([output[:, : self.own_dim], output[:, self.own_dim :] * self.tap_scale], dim=1)
        return output

    def _build_shell(self, start: str | None, stop: str | None) -> nn.Module:
        shell = share(self.model)
        if start is not None:
            resume = self._examined().resumes[start]
            resume_at(shell, start, resume.skipped, resume.dense)
        if stop is not None:
            stop_at(shell, self._examined().cut(stop).name)
        return shell

    def _check_overlay(self, overlay: Mapping[str, Tensor]) -> None:
        for name, tensor in overlay.items():
            shape = self._shapes.get(name)
            if shape is None:
                raise unknown("tensor", name, self._shapes, where=f"backbone {self.name!r}")
            if tensor.shape != shape:
                raise ModmetaError(
                    f"the overlay's tensor {name!r} has shape {tuple(tensor.shape)}; make it {tuple(shape)}"
                )

    def _examined(self) -> Anatomy:
        if self._anatomy is None:
            self._anatomy = apart(lambda: examine(self.model, self.image_size, self.feature_dim, self.taps))
            if not self._anatomy.cuts:
                warnings.warn(
                    f"backbone {self.name!r} cannot be cut; every pass runs all of it, which is slower",
                    stacklevel=3,
                )
        return self._anatomy

    def _measure(self) -> int:
        """Return the length of the feature vectors, from a first pass that also shows if the size suits."""
        try:
            with torch.no_grad():
                features = share(self.model)(torch.zeros(1, 3, self.image_size, self.image_size, device="cpu"))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ModmetaError(
                f"backbone {self.name!r} cannot take images of size {self.image_size} ({first_line(error)}); "
                f"choose another image_size, such as its default"
            ) from error
        if features.ndim != 2:
            raise ModmetaError(
                f"backbone {self.name!r} gives features of shape {tuple(features.shape[1:])}, not a vector; "
                "choose another"
            )
        return int(features.shape[1])

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._shells.clear()  # moving the model gives its parameters new storage
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._shells.clear()  # so does load_state_dict(assign=True)
        super()._load_from_state_dict(*args, **kwargs)
