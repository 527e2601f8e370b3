"""Fetches the two JavaScript packages that the page runs on, checks them, and keeps what the page needs.

    python space-static/vendor_packages.py

    npm package, of one version and hash ── vendor/: modules as they are, WebAssembly gzipped, licences

They are not in the repository. `npm` downloads them, from the registry that it is set up for.
"""

import argparse
import base64
import gzip
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "vendor"
SECONDS = 600  # for a download


@dataclass(frozen=True)
class Package:
    """An npm package.

    Attributes:
        name, version: as npm knows it.
        integrity: SHA-512 of its archive in base64, as npm's lock files have it.
        files: path in the archive → name in vendor/; what ends in `.gz` there is packed.
    """

    name: str
    version: str
    integrity: str
    files: dict[str, str]

    @property
    def stamp(self) -> str:
        return f"{self.name}@{self.version} sha512-{self.integrity}"


PACKAGES = (
    Package(
        "onnxruntime-web",
        "1.30.0",
        "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
        {
            "dist/ort.wasm.min.mjs": "ort.wasm.min.mjs",
            "dist/ort-wasm-simd-threaded.mjs": "ort-wasm-simd-threaded.mjs",
            "dist/ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm.gz",
        },
    ),
    Package(
        "@huggingface/tokenizers",
        "0.2.0",
        "LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
        {"dist/tokenizers.min.mjs": "tokenizers.min.mjs", "LICENSE": "LICENSE-tokenizers.txt"},
    ),
)
STAMP = FOLDER / "versions.txt"


def expected_stamp() -> str:
    return "".join(f"{package.stamp}\n" for package in PACKAGES)


def is_vendored() -> bool:
    """Whether vendor/ holds these versions, all files of them."""
    names = [name for package in PACKAGES for name in package.files.values()]
    stamped = STAMP.is_file() and STAMP.read_text() == expected_stamp()
    return stamped and all((FOLDER / name).is_file() for name in names)


def download(package: Package, folder: Path) -> bytes:
    """The archive of a package.

    Raises:
        RuntimeError: no npm, no network, or another archive than the one that was pinned.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("npm is needed to download the page's JavaScript packages: install Node.js")
    command = [npm, "pack", f"{package.name}@{package.version}", "--silent", "--pack-destination", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=folder)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"npm pack {package.name}@{package.version} took more than {SECONDS} seconds") from None
    archives = list(folder.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        reason = next((line for line in done.stderr.splitlines() if line.strip()), f"exit status {done.returncode}")
        raise RuntimeError(f"npm pack {package.name}@{package.version} failed: {reason}")
    data = archives[0].read_bytes()
    found = base64.b64encode(hashlib.sha512(data).digest()).decode()
    if found != package.integrity:
        raise RuntimeError(
            f"{package.name}@{package.version} has the SHA-512 {found}, not the pinned {package.integrity}"
        )
    return data


def vendor(package: Package, target: Path):
    """Downloads a package and puts its files into `target`.

    Raises:
        RuntimeError: as `download`.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = download(package, Path(folder))
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for path, name in package.files.items():
                data = archive.extractfile(f"package/{path}").read()
                packed = gzip.compress(data, 9, mtime=0) if name.endswith(".gz") else data
                (target / name).write_bytes(packed)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if is_vendored():
        return
    try:
        shutil.rmtree(FOLDER, ignore_errors=True)
        FOLDER.mkdir()
        for package in PACKAGES:
            vendor(package, FOLDER)
            print(f"{package.name} {package.version}", flush=True)
        STAMP.write_text(expected_stamp())
    except (OSError, RuntimeError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:  # without the stamp, the next run begins anew
        print("interrupted: run it again", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
