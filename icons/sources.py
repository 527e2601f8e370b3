"""Where the icons and their texts come from: exact versions, fetched with npm, apt or dpkg and checked by hash.

`fetch_sources(cache)` downloads what is missing, verifies every archive against the SHA-256 written here, unpacks it
once and returns the folder of each source.
"""

import hashlib
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One package of a registry.

    Args:
        name: name in the registry, for example `@iconify/json`.
        version: exact version.
        registry: `npm` or `debian`.
        sha256: hash of the archive as the registry serves it.
        licence: SPDX identifier of the package itself; icon sets of a collection carry their own.
        holds: `images`, `texts` or both, as the attribution states it.
    """

    name: str
    version: str
    registry: str
    sha256: str
    licence: str
    holds: str

    @property
    def slug(self) -> str:
        """Name of the folder in the cache: `@iconify/json` becomes `iconify-json`."""
        return self.name.lstrip("@").replace("/", "-")


def _npm(name: str, version: str, sha256: str, licence: str, holds: str) -> Source:
    return Source(name, version, "npm", sha256, licence, holds)


SOURCES: dict[str, Source] = {
    source.slug: source
    for source in (
        _npm(
            "@iconify/json",
            "2.2.535",
            "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91",
            "MIT",
            "images and names",
        ),
        _npm(
            "@lobehub/fluent-emoji-3d",
            "1.1.0",
            "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
            "MIT",
            "images",
        ),
        _npm(
            "@carbon/pictograms",
            "12.82.0",
            "04509c75e9759af7064a0817b04be09f4600147a43c8720b815034531ee2e548",
            "Apache-2.0",
            "images, names and aliases",
        ),
        Source(
            "openclipart-svg",
            "1:0.18+dfsg-19",
            "debian",
            "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
            "public domain",
            "images, names and keywords",
        ),
        _npm(
            "lucide-static",
            "1.62.0",
            "386f9080c440d6f5049cefe3456ae8357f7a0c7f76e59670cd1cb83bc7050a44",
            "ISC",
            "tags",
        ),
        _npm(
            "@tabler/icons",
            "3.51.0",
            "b30108713d3fa60aee862c2a133225da8e0f309be0708fe2925763ff810c766c",
            "MIT",
            "tags",
        ),
        _npm(
            "@mdi/svg",
            "7.4.47",
            "de92e5dc9ce46c392ab5c53aa7190b19f82b40cb48872a083f788c7e13e91fef",
            "Apache-2.0",
            "aliases",
        ),
        _npm(
            "@phosphor-icons/core",
            "2.1.1",
            "313332be6190b724da24107addd781799b48bf76b13963f24501112ffe1baadd",
            "MIT",
            "tags",
        ),
        _npm(
            "cldr-annotations-full",
            "48.2.0",
            "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
            "Unicode-3.0",
            "emoji names and keywords",
        ),
        _npm(
            "emojibase-data",
            "17.0.0",
            "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
            "MIT",
            "emoji names and keywords",
        ),
        Source(
            "wamerican-small",
            "2020.12.07-2",
            "debian",
            "bfebd3ce5f04a62f5fbeb6707ea1160e37d645754145138343009209f0deadb6",
            "SCOWL",
            "English words for the tokenizer",
        ),
        Source(
            "wordnet-base",
            "1:3.0-37",
            "debian",
            "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
            "WordNet 3.0",
            "related words and definitions",
        ),
    )
}


def fetch_sources(cache: Path) -> dict[str, Path]:
    """Downloads, verifies and unpacks every source that the cache lacks.

    Args:
        cache: folder that keeps the archives (`archives/`) and their contents (`sources/`) between runs.

    Returns:
        Folder of each source by its slug.

    Raises:
        RuntimeError: if a client is missing, a download fails, or an archive has another hash than the pinned one.
    """
    return {slug: fetch_source(source, cache) for slug, source in SOURCES.items()}


def fetch_source(source: Source, cache: Path) -> Path:
    """The folder of one source; see `fetch_sources`."""
    return _unpack(source, _download(source, cache / "archives"), cache)


def _download(source: Source, folder: Path) -> Path:
    """The verified archive of a source, downloaded if it is not there yet."""
    archive = (
        folder / f"{source.slug}-{source.version.replace(':', '_')}.{'tgz' if source.registry == 'npm' else 'deb'}"
    )
    if not archive.exists():
        scratch = folder / f"{source.slug}.partial"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        if source.registry == "npm":
            command = ["npm", "pack", "--silent", f"{source.name}@{source.version}"]
        else:
            command = ["apt-get", "download", f"{source.name}={source.version}"]
        print(f"downloading {source.name} {source.version}", flush=True)
        _run(command, scratch)
        _verify(source, next(scratch.iterdir()))
        next(scratch.iterdir()).rename(archive)  # only a verified archive ever gets the final name
        scratch.rmdir()
    else:
        _verify(source, archive)
    return archive


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is needed to download the sources: install it and run again") from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"`{' '.join(command)}` failed: {error.stderr.strip()[-500:]}") from None


def _verify(source: Source, archive: Path) -> None:
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != source.sha256:
        raise RuntimeError(f"{archive} has SHA-256 {found}, expected {source.sha256}: delete it and run again")


def _unpack(source: Source, archive: Path, cache: Path) -> Path:
    """The folder with the contents of an archive, unpacked if it is not there yet."""
    folder = cache / "sources" / archive.stem
    if not folder.exists():
        scratch = folder.with_name(folder.name + ".partial")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        if source.registry == "npm":
            with tarfile.open(archive) as contents:
                contents.extractall(scratch, filter="data")
        else:
            _run(["dpkg-deb", "--extract", str(archive.resolve()), "."], scratch)
        scratch.rename(folder)
    return folder / "package" if source.registry == "npm" else folder / "usr" / "share"
