"""Finding the image files below a folder ``root/domain/class/image``, without opening any."""

from __future__ import annotations

import os
import stat
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from modmeta.data.decode import SUFFIXES, printable
from modmeta.errors import ModmetaError

LAYOUT = "expected ROOT/domain/class/image"
LONGEST_NAME = 256  # characters of a domain's or class's name


@dataclass(frozen=True)
class ImageFile:
    """An image that the scanner found, not opened yet."""

    domain: str
    class_name: str
    name: str
    size: int
    changed_ns: int

    @property
    def relative(self) -> str:
        """The path below the root."""
        return f"{self.domain}/{self.class_name}/{self.name}"


@dataclass(frozen=True)
class Skipped:
    """An entry that is not taken: where it lies below the root, and why."""

    relative: str
    reason: str


@dataclass(frozen=True)
class Scan:
    """What lies below a root.

    Attributes:
        files: the images, sorted by domain, class and name.
        skipped: what was passed over; hidden files and folders are passed over without a word.
        faults: one line for each thing that keeps the folder from being used, such as a class without images.
    """

    files: tuple[ImageFile, ...]
    skipped: tuple[Skipped, ...]
    faults: tuple[str, ...]


def scan(root: Path) -> Scan:
    """List the images below ``root``.

    A link is followed if it leads to something below ``root`` that has not been listed yet, so that nothing is
    listed twice and no loop is entered. Only names and types are looked at; no file is opened.

    Raises:
        ModmetaError: if ``root`` is missing or cannot be read.
    """
    if not root.is_dir():
        raise ModmetaError(f"the data folder {printable(str(root))} does not exist; {LAYOUT}")
    walk = _Walk(root, root.resolve())
    walk.folder(())
    for names in walk.links:  # grows while a followed folder holds further links
        walk.follow(names)
    return walk.result()


def scan_domain(folder: Path) -> Scan:
    """List the images of one domain ``folder/class/image`` as :func:`scan` does, below the parent of ``folder``."""
    place = folder.resolve()
    walk = _Walk(place.parent, place)
    walk.folder((place.name,))
    for names in walk.links:
        walk.follow(names)
    return walk.result()


@dataclass
class _Walk:
    """The state of one scan; ``names`` is a path below the root."""

    root: Path
    inside: Path
    files: list[ImageFile] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    links: list[tuple[str, ...]] = field(default_factory=list)
    folders: list[tuple[str, ...]] = field(default_factory=list)
    seen: set[tuple[int, int]] = field(default_factory=set)

    def folder(self, names: tuple[str, ...]) -> None:
        """List a folder and what is below it; links wait until everything else is known."""
        path = self.root.joinpath(*names)
        self.folders.append(names)
        try:
            status = path.stat()
            self.seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            if not names:
                raise ModmetaError(f"cannot read the folder {path} ({error.strerror}); check its rights") from error
            self.faults.append(f"cannot read the folder {printable(str(path))} ({error.strerror}); check its rights")
            return
        for entry in visible:
            if entry.is_symlink():
                self.links.append((*names, entry.name))
            else:
                self.entry((*names, entry.name), entry.stat(follow_symlinks=False))

    def entry(self, names: tuple[str, ...], status: os.stat_result) -> None:
        """Take a folder or file at its depth, or say why not."""
        is_folder = stat.S_ISDIR(status.st_mode)
        fault = _name_fault(names[-1])
        if is_folder and len(names) < 3:
            if fault:
                self.faults.append(f"the folder {self._shown(names)} has a name that {fault}; rename it")
            else:
                self.folder(names)
        elif len(names) < 3:
            self.skip(names, "is not a folder, and images lie two folders deep")
        elif is_folder:
            self.skip(names, "is a folder")
        elif os.path.splitext(names[-1])[1].lower() not in SUFFIXES:
            self.skip(names, "is not named like an image")
        elif not stat.S_ISREG(status.st_mode):
            self.skip(names, "is not a regular file")
        elif fault:
            self.skip(names, f"has a name that {fault}")
        else:
            self.seen.add((status.st_dev, status.st_ino))
            domain, class_name, name = names
            self.files.append(ImageFile(domain, class_name, name, status.st_size, status.st_mtime_ns))

    def follow(self, names: tuple[str, ...]) -> None:
        """Take what a link leads to, if it lies below the root and is not known already."""
        path = self.root.joinpath(*names)
        try:
            target = path.resolve(strict=True)
            status = target.stat()
        except (OSError, RuntimeError):  # Python 3.11 and 3.12 raise the latter for a loop
            self.skip(names, "is a link that leads nowhere")
            return
        if not target.is_relative_to(self.inside):
            self.skip(names, "is a link that leads out of the data folder")
        elif (status.st_dev, status.st_ino) in self.seen:
            known = printable(str(target.relative_to(self.inside)))
            self.skip(names, f"is a link to {known}, which is known already")
        else:
            self.entry(names, status)

    def skip(self, names: tuple[str, ...], reason: str) -> None:
        """Pass an entry over."""
        self.skipped.append(Skipped(printable("/".join(names)), reason))

    def result(self) -> Scan:
        """Return what was found, with a fault for every folder in which nothing was."""
        above = {names[:depth] for names in self.folders for depth in range(len(names))}
        above |= {(file.domain, file.class_name) for file in self.files}
        for names in sorted(set(self.folders) - above):
            shown = self._shown(names)
            if len(names) == 2:
                self.faults.append(f"the class folder {shown} holds no image; add images or remove it")
            else:
                kind, lacking = ("domain", "class") if names else ("data", "domain")
                self.faults.append(f"the {kind} folder {shown} has no {lacking} folders; {LAYOUT}")
        files = sorted(self.files, key=lambda file: (file.domain, file.class_name, file.name))
        skipped = sorted(self.skipped, key=lambda entry: entry.relative)
        return Scan(tuple(files), tuple(skipped), tuple(self.faults))

    def _shown(self, names: tuple[str, ...]) -> str:
        return printable(str(self.root.joinpath(*names)))


def _name_fault(name: str) -> str | None:
    if len(name) > LONGEST_NAME:
        return f"is longer than {LONGEST_NAME} characters"
    kinds = {unicodedata.category(character) for character in name}
    if "Cs" in kinds:  # how Python holds bytes that are not UTF-8
        return "is not UTF-8"
    if kinds & {"Cc", "Zl", "Zp"}:
        return "has control characters"
    return None
