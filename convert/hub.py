"""Files of a checkpoint: in a folder, or in a repository of the Hub, downloaded one by one when they are asked for.

    --checkpoint FOLDER    ─ CheckpointFiles ─┐
                                              ├─ find("config.json"), need("tokenizer.json"), weights() ─ paths
    --checkpoint OWNER/NAME ─ HubFiles ───────┘

So that what can't be converted is refused by its config before gigabytes of weights are fetched. Cache, token, resumed
downloads and the progress bar are huggingface_hub's; all files come from one commit, that of the first one.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging, validate_repo_id
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ..configuration_mome import quoted, shortened
from ..errors import ConversionError, first_sentence

WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


class CheckpointFiles:
    """The files in a folder.

    Attributes:
        name: what messages and cards call the checkpoint.
    """

    def __init__(self, folder: Path):
        self.name, self.folder = str(folder), folder

    def find(self, *names: str) -> Path | None:
        """The first of these files that there is.

        Raises:
            ConversionError: the Hub can't be asked.
        """
        return next((path for name in names if (path := self._path(name)) is not None), None)

    def need(self, *names: str, hint: str = "it is incomplete or of another kind") -> Path:
        """As `find`.

        Raises:
            ConversionError: there is none of them; `hint` says what that means.
        """
        path = self.find(*names)
        if path is None:
            raise ConversionError(f"checkpoint {self.name} has no {' and no '.join(names)}{self._place}: {hint}")
        return path

    def weights(self, *names: str) -> list[Path]:
        """The files of the weights: the first of `names` that there is, or all parts of it if it is an index.

        Args:
            names: default: those that transformers writes, safetensors before pickles.

        Raises:
            ConversionError: there is none, or a part is missing.
        """
        names = names or WEIGHT_FILES
        path = self.find(*names)
        if path is None:
            raise ConversionError(f"checkpoint {self.name} has no weights{self._place}: expected {' or '.join(names)}")
        if not path.name.endswith(".index.json"):
            return [path]
        try:
            parts = {Path(name).name for name in self.json(path)["weight_map"].values()}
        except (AttributeError, KeyError, TypeError) as error:
            raise ConversionError(f"checkpoint {self.name}: {path.name} is no index of weights") from error
        return [self.need(part, hint=f"{path.name} names it, the checkpoint is incomplete") for part in sorted(parts)]

    def json(self, path: Path) -> dict:
        """The object in a JSON file.

        Raises:
            ConversionError: it is none.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # no UTF-8 or no JSON
            raise ConversionError(
                f"checkpoint {self.name}: {path.name} can't be read: {first_sentence(error)}"
            ) from error
        if not isinstance(content, dict):
            raise ConversionError(f"checkpoint {self.name}: {path.name} holds no JSON object")
        return content

    _place = ""  # where nothing was found, if messages should tell

    def _path(self, name: str) -> Path | None:
        path = self.folder / name
        return path if os.path.isfile(path) else None


class HubFiles(CheckpointFiles):
    """The files of a repository on the Hub.

    Attributes:
        revision: branch, tag or commit that was asked for; once a file is there, its commit.
    """

    def __init__(self, repo_id: str, revision: str | None = None):
        self.name, self.revision = repo_id, revision

    def _path(self, name: str) -> Path | None:
        with self._errors_in_one_line(name), _quiet():
            try:
                path = Path(hf_hub_download(self.name, name, revision=self.revision))
            except EntryNotFoundError as error:
                # Not on the Hub. But what is merely not in the cache can be there.
                if isinstance(error, LocalEntryNotFoundError) and not (self._is_known and constants.HF_HUB_OFFLINE):
                    raise
                return None
        self.revision = path.parents[name.count("/")].name  # …/snapshots/COMMIT/name
        return path

    @property
    def _place(self) -> str:
        return " in the cache, and HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""

    @property
    def _is_known(self) -> bool:
        """Whether a file of the repository was found already."""
        return self.revision is not None and len(self.revision) == 40

    @contextmanager
    def _errors_in_one_line(self, name: str) -> Iterator[None]:
        what = f"checkpoint {shortened(self.name)}"
        try:
            yield
        except GatedRepoError as error:
            raise ConversionError(
                f"{what} is gated: accept its terms at {constants.ENDPOINT}/{self.name}, then log in with "
                "`hf auth login` or set HF_TOKEN"
            ) from error
        except RepositoryNotFoundError as error:
            raise ConversionError(
                f"{what} is neither a folder nor a repository on the Hub that you can read: check the name; a private "
                "one needs `hf auth login` or HF_TOKEN"
            ) from error
        except RevisionNotFoundError as error:
            raise ConversionError(
                f"{what} has no revision {quoted(self.revision)}: pass a branch, a tag or a commit"
            ) from error
        except HfHubHTTPError as error:
            raise ConversionError(f"{what}: the Hub did not send {name}: {first_sentence(error)}") from error
        except (LocalEntryNotFoundError, RuntimeError) as error:
            # Without a network, huggingface_hub before 2 closes its client and then calls it once more.
            if isinstance(error, RuntimeError) and "client has been closed" not in str(error):
                raise
            reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub can't be reached"
            raise ConversionError(
                f"{what}: {name} is not in the cache, and {reason}: check the network, or pass a folder"
            ) from error
        except (OSError, ValueError) as error:  # a full disk; a download that is shorter than it should be
            raise ConversionError(f"{what}: {name} can't be downloaded: {first_sentence(error)}") from error
        except Exception as error:
            if not type(error).__module__.startswith("httpx"):  # httpx or a successor, by the release of the library
                raise
            raise ConversionError(
                f"{what}: the download of {name} broke off: {first_sentence(error)}; run the same command again"
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a warning for every retry: an error follows that says it all."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def checkpoint_files(checkpoint: str | Path, revision: str | None = None) -> CheckpointFiles:
    """The files of a checkpoint.

    Args:
        checkpoint: a folder, or the id of a repository on the Hub.
        revision: of a repository: branch, tag or commit. Default: its main branch.

    Raises:
        ConversionError: neither a folder nor what could be an id; a revision of a folder.
    """
    path = Path(checkpoint)
    if os.path.isdir(path):
        if revision is not None:
            raise ConversionError(
                f"--revision {shortened(revision)}: checkpoint {shortened(path)} is a folder, which has no revisions"
            )
        return CheckpointFiles(path)
    if os.path.exists(path):
        raise ConversionError(f"checkpoint {shortened(checkpoint)} is a file: pass a folder, or OWNER/NAME on the Hub")
    try:
        validate_repo_id(str(checkpoint))
    except HFValidationError as error:
        raise ConversionError(
            f"checkpoint {shortened(checkpoint)} does not exist: pass a folder, or OWNER/NAME on the Hub"
        ) from error
    return HubFiles(str(checkpoint), revision)
