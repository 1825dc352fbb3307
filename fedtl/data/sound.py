"""``data.source = "sound"``: a folder of wav files, or a zip of one, as log-mel pictures."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from fedtl.data.examples import (
    Examples,
    content_fingerprint,
    data_problems,
)
from fedtl.data.files import Files, open_files, unwrapped
from fedtl.data.folder import (
    class_of,
    clients_by_pattern,
    layout_problems,
    named_by,
    numbered,
    readable,
)
from fedtl.data.log_mel import Picture, Recordings
from fedtl.errors import InputError
from fedtl.scenario.schema import Data

EXTENSIONS = (".wav", ".wave")
MAX_BANDS = 128
"""Of a picture that is made square."""


def load_sound(data: Data, *, one_client: bool = False) -> Examples:
    """Recordings in class folders, or whose class ``data.label_pattern`` finds in their paths.

    As for pictures: ``<class>/<file>``, with ``data.domains`` ``<domain>/<class>/<file>``; what
    ``data.client_pattern`` finds in a path is its client. The fingerprint is over the bytes of
    every file, its path, and what pictures depend on (``data.rate``, ``seconds``, ``mel_bands``).
    ``one_client``: a single class will do, others may have more.

    Raises:
        InputError: nothing there, or every problem with the layout at once.
        SecurityRefusal: a link or a member of the archive leads outside.
    """
    if data.path is None:
        raise InputError("missing", where="data.path", do="Name the folder of recordings, or a zip")
    depth = 0 if data.label_pattern else 2 if data.domains else 1
    files = unwrapped(open_files(Path(data.path)), EXTENSIONS, depth)
    paths = [path for path in files.paths if path.lower().endswith(EXTENSIONS)]
    paths.sort(key=lambda path: (unicodedata.normalize("NFC", path), path))
    if data.label_pattern is None:
        problems = layout_problems(paths, files.folders, data, one_client, "recording", EXTENSIONS)
        if problems:
            raise data_problems(str(files.root), problems)
    elif not paths:
        raise InputError(f"no recording in it ({' '.join(EXTENSIONS)})", where=str(files.root))
    paths, digests, left_out = readable(files, paths, data, "recording")
    return _examples(files, paths, digests, data, left_out, one_client)


def _examples(
    files: Files,
    paths: list[str],
    digests: bytes,
    data: Data,
    notes: tuple[str, ...],
    one_client: bool,
) -> Examples:
    """Labels, domains and clients from the paths of the recordings."""
    names = [unicodedata.normalize("NFC", path) for path in paths]
    if data.label_pattern is None:
        words = [class_of(name.rpartition("/")[0], data) for name in names]
    else:
        words = named_by(names, data.label_pattern, "data.label_pattern", "class")
    labels, classes = numbered(words)
    if len(classes) < 2 and not one_client:
        raise InputError("only one class; a classifier needs two", where=str(files.root))
    domains, domain_names = None, tuple[str, ...]()
    if data.domains:
        domains, domain_names = numbered([name.partition("/")[0] for name in names])
    elif data.domain_pattern is not None:
        found = named_by(names, data.domain_pattern, "data.domain_pattern", "domain")
        domains, domain_names = numbered(found)
    clients, client_names, dealt = clients_by_pattern(names, data)
    picture = picture_of(data)
    if picture.bands != picture.frames:
        notes = (
            *notes,
            f"pictures are {picture.bands} bands x {picture.frames} frames, and trunks see the "
            f"square in the middle: data.mel_bands = {picture.frames} would show all",
        )
    content = digests + picture.identity().encode()
    return Examples(
        labels,
        classes,
        content_fingerprint(content, labels, classes, domains, domain_names),
        Recordings(files, paths, picture),
        domains=domains,
        domain_names=domain_names,
        clients=clients,
        client_names=client_names,
        notes=notes,
        dealt=dealt,
    )


def picture_of(data: Data) -> Picture:
    """What recordings are made into; square where the scenario does not say otherwise."""
    square = Picture(data.rate, data.seconds, 1).frames
    return Picture(data.rate, data.seconds, data.mel_bands or min(square, MAX_BANDS))
