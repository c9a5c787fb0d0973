"""Models of the hub: what of a repository is needed is downloaded to the hub's cache, or found there; headers alone on request.

HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE mean what they mean everywhere, because the hub's own library reads them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelglue.checkpoint.formats.folder import hub_id_of, read_config
from modelglue.checkpoint.formats.header import Entry, parse_header, shown
from modelglue.checkpoint.formats.shards import PICKLED, SAFETENSORS, WeightFormat, weight_map
from modelglue.checkpoint.formats.side_files import SIDE_FILES, side_files
from modelglue.checkpoint.protocol import Checkpoint, SideFile, TensorInfo
from modelglue.errors import CheckpointError, UserError, did_you_mean

if TYPE_CHECKING:
    import torch

#: files of an adapter
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
#: the card tells licence and parents
_ALWAYS = frozenset({"config.json", "README.md", *SIDE_FILES})
#: what every header's first request asks for: most headers are shorter
_FIRST_BYTES = 100_000
#: seconds until the hub counts as out of reach
_PATIENCE = 10.0
#: HTTP's "206 Partial Content"
_PARTIAL = 206


def model_folder(reference: str) -> Path:
    """The folder, in the hub's cache, of the model that `org/name[@revision]` means.

    Downloads config, tokenizer, code that the config names, and one set of weights: safetensors where the repository has them. Without
    a network (or with HF_HUB_OFFLINE) it is what the cache has. Raises CheckpointError.
    """
    files = _list_files(reference)
    if files is None:
        return cached_folder(reference)
    form = _format_of(reference, files)
    index = next((name for name in form.indexes if name in files), None)
    if index is not None:
        weights = [index, *weight_map(_download(reference, [index]) / index).values()]
    else:
        single = next((name for name in form.singles if name in files), None)
        weights = [single] if single is not None else _weights_among(files, form)
    return _download(reference, [*_beside(files), *weights])


def adapter_folder(reference: str) -> Path:
    """The folder, in the hub's cache, of the adapter that `org/name[@revision]` means; like `model_folder`."""
    files = _list_files(reference)
    if files is None:
        return cached_folder(reference)
    if "adapter_config.json" not in files:
        raise CheckpointError(f"'{reference}': is no adapter: the repository has no adapter_config.json.")
    weights = [name for name in _ADAPTER if name in files and not (name.endswith(".bin") and _ADAPTER[1] in files)]
    return _download(reference, [*_beside(files), *weights])


def open_headers(reference: str) -> Checkpoint | None:
    """The model that `org/name[@revision]` means without its weights, or None where only the cache can tell.

    Config and tokenizer are downloaded; of the weights, the headers alone.
    """
    files = _list_files(reference)
    if files is None:
        return None
    form = _format_of(reference, files)
    if form is not SAFETENSORS:
        raise CheckpointError(f"'{reference}': has pickled weights only, whose shapes cannot be read from afar. Download the model first.")
    index = next((name for name in form.indexes if name in files), None)
    folder = _download(reference, [*_beside(files), *([index] if index is not None else [])])
    single = next((name for name in form.singles if name in files), None)
    if index is not None:
        weights = sorted(set(weight_map(folder / index).values()))
    else:
        weights = [single] if single is not None else _weights_among(files, form)
    return HeadersCheckpoint(folder, reference, {name: _remote_header(reference, name) for name in weights})


class HeadersCheckpoint(Checkpoint):
    """A model of the hub of which only names, shapes and dtypes are here: enough to check a recipe, not to read a tensor."""

    def __init__(self, folder: Path, reference: str, headers: Mapping[str, Mapping[str, Entry]]) -> None:
        self._folder = folder
        self._reference = reference
        self._infos: dict[str, TensorInfo] = {}
        for file, entries in headers.items():
            for name, entry in entries.items():
                if name in self._infos:
                    raise CheckpointError(f"'{reference}': {file}: tensor {shown(name)} stands in another shard as well.")
                self._infos[name] = entry.info

    def __repr__(self) -> str:
        return f"HeadersCheckpoint({self._reference!r})"

    @property
    def places(self) -> Sequence[Path]:
        return (self._folder,)

    @property
    def hub_id(self) -> str | None:
        return hub_id_of(self._folder)

    def names(self) -> Sequence[str]:
        return tuple(sorted(self._infos))

    def info(self, name: str) -> TensorInfo:
        try:
            return self._infos[name]
        except KeyError:
            raise CheckpointError(f"{self._reference}: has no tensor '{name}'.{did_you_mean(name, self._infos)}") from None

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        raise self._not_here("its weights")

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return read_config(self._folder)

    @cached_property
    def files(self) -> Mapping[str, SideFile]:
        return side_files(self._folder)

    @property
    def identity(self) -> str:
        raise self._not_here("an identity, which is made of its weights,")

    @cached_property
    def stamp(self) -> str:
        infos = {name: [info.dtype, list(info.shape)] for name, info in sorted(self._infos.items())}
        return hashlib.sha256(json.dumps([self._reference, str(self._folder), infos]).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        return {"model": self._reference}

    def _not_here(self, what: str) -> UserError:
        return UserError(f"'{self._reference}': only the headers of this model are here; {what} cannot be read. Download it first.")


def _split(reference: str) -> tuple[str, str | None]:
    repository, _, revision = reference.partition("@")
    return repository, revision or None


def _list_files(reference: str) -> frozenset[str] | None:
    """The files at the top of the repository; None where the hub cannot be reached. CheckpointError for its refusals."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    repository, revision = _split(reference)
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        files = [file.rfilename for file in HfApi().model_info(repository, revision=revision, timeout=_PATIENCE).siblings or ()]
    except HFValidationError as error:
        raise CheckpointError(f"'{reference}': is no local path, and no hub id either: {error}") from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"'{reference}': is gated. Accept its terms on the hub, and set HF_TOKEN to a token of that account."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"'{reference}': the repository has no revision '{revision}'. Give a branch, a tag or a commit.") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"'{reference}': is no local path, and the hub has no such repository, or not for you. "
            "Check the name; for a private one set HF_TOKEN."
        ) from error
    except HfHubHTTPError as error:
        raise CheckpointError(f"'{reference}': the hub answered: {error}") from error
    except Exception:  # its ways to say that there is no network have no class in common
        return None
    return frozenset(name for name in files if "/" not in name)


def cached_folder(reference: str) -> Path:
    """The folder that the cache has for `org/name[@revision]`, never asking the network; CheckpointError where there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repository, revision = _split(reference)
    try:
        for name in ("config.json", *SAFETENSORS.indexes, *SAFETENSORS.singles, *PICKLED.indexes, *PICKLED.singles, *_ADAPTER):
            if isinstance(path := try_to_load_from_cache(repository, name, revision=revision), str):
                return Path(path).parent
    except HFValidationError as error:
        raise CheckpointError(f"'{reference}': is no local path, and no hub id either: {error}") from error
    raise CheckpointError(
        f"'{reference}': is no local path, and not in the hub's cache, and the hub cannot be reached. "
        "Download it first, or give the path of a local folder."
    )


def _format_of(reference: str, files: frozenset[str]) -> WeightFormat:
    for form in (SAFETENSORS, PICKLED):
        if _weights_among(files, form):
            return form
    if "model_index.json" in files:
        raise CheckpointError(
            f"'{reference}': is a diffusion pipeline of several models. Download it (hf download {_split(reference)[0]}) and refer to the "
            "folder of one of its components, such as .../unet."
        )
    if "adapter_config.json" in files:
        raise CheckpointError(f"'{reference}': is an adapter, not a model. Refer to it together with its base: BASE+{reference}.")
    if any(name.endswith(".gguf") for name in files):
        raise CheckpointError(
            f"'{reference}': holds GGUF files only, the quantised format of llama.cpp. Merge the original release and convert the result."
        )
    raise CheckpointError(f"'{reference}': the repository holds no .safetensors, .bin, .pt or .pth file.")


def _weights_among(files: Iterable[str], form: WeightFormat) -> list[str]:
    return sorted(name for name in files if name.endswith(form.suffixes) and not name.startswith(form.others))


def _beside(files: frozenset[str]) -> list[str]:
    return sorted(name for name in files if name in _ALWAYS or name.endswith(".py"))


def _download(reference: str, names: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, revision = _split(reference)
    exact = [name.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]") for name in names]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=exact))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"'{reference}': cannot be downloaded: {error}") from error


def _remote_header(reference: str, name: str) -> Mapping[str, Entry]:
    from huggingface_hub import get_hf_file_metadata, get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    repository, revision = _split(reference)
    place = f"{reference}/{name}"
    url = hf_hub_url(repository, name, revision=revision)
    begin, held = 0, b""

    def fetch(count: int) -> bytes:
        nonlocal begin, held
        if len(held) < count:
            wanted = max(count, _FIRST_BYTES)
            headers = {**build_hf_headers(), "range": f"bytes={begin}-{begin + wanted - 1}"}
            held = b""
            with get_session().stream("GET", url, headers=headers) as response:
                hf_raise_for_status(response)
                if begin and response.status_code != _PARTIAL:
                    raise CheckpointError(f"{place}: the server does not hand out parts of files. Download the model first.")
                for part in response.iter_bytes():
                    held += part
                    if len(held) >= wanted:
                        break
        text, held = held[:count], held[count:]
        begin += len(text)
        return text

    try:
        size = get_hf_file_metadata(url).size or 0
        return parse_header(place, size, fetch)
    except CheckpointError:
        raise
    except Exception as error:  # the hub library's network errors have no class in common
        raise CheckpointError(f"{place}: its header cannot be fetched: {error}. Download the model first.") from error
