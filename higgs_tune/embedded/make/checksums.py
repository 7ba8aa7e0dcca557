"""Write or check `embedded/SHA256SUMS`: `python -m higgs_tune.embedded.make.checksums [--check]`."""

import argparse
import hashlib
import sys
from pathlib import Path

EMBEDDED = Path(__file__).parents[1]
FOLDERS = ("base", "codec", "speech", "wav")


def checksums(root: Path) -> dict[str, str]:
    """SHA-256 of every file in the asset folders, keyed by its path below `root`."""
    files = sorted(p for folder in FOLDERS for p in (root / folder).rglob("*") if p.is_file())
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


def read_sums(path: Path) -> dict[str, str]:
    """Return the digests of a SHA256SUMS file, as `sha256sum` writes it, keyed by name."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def main() -> None:
    """Command line; with --check, exit 1 and the names of the files that differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args()
    found, path = checksums(EMBEDDED), EMBEDDED / "SHA256SUMS"
    if not args.check:
        lines = [f"{digest}  {name}\n" for name, digest in found.items()]
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{path}: {len(found)} files")
        return
    noted = read_sums(path)
    differing = sorted(n for n in found.keys() | noted.keys() if found.get(n) != noted.get(n))
    if differing:
        sys.exit("these files differ from SHA256SUMS: " + ", ".join(differing))


if __name__ == "__main__":
    main()
