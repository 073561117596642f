"""Write the quickstart's training pictures: real photographs with their captions as file names.

The photographs are the ones that the wheels of scikit-image and scikit-learn carry, so nothing is fetched.
``china.jpg`` (by danielbuechele) and ``flower.jpg`` (by vultilion) of scikit-learn are under the Creative Commons
Attribution 2.0 licence; scikit-image names the origin of its own in ``skimage.data``.

Runs inside the project's environment: ``python scripts/prepare_quickstart.py``.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

DEFAULT_FOLDER: Final = Path(__file__).resolve().parents[1] / "training_samples" / "quickstart"

SKIMAGE: Final = ("skimage", "data")
SKLEARN: Final = ("sklearn", "datasets", "images")

ENCODER_OPTIONS: Final[dict[str, dict[str, object]]] = {
    ".jpg": {"format": "JPEG", "quality": 92},
    ".png": {"format": "PNG", "optimize": True},
    ".webp": {"format": "WEBP", "quality": 90},
}


@dataclass(frozen=True)
class Photograph:
    """One picture of the quickstart.

    Attributes:
        package: package and folders below it that hold the source file.
        source: file name of the source.
        target: ``subfolder/caption.ending``; the ending picks the file format.
        crop: left, top, right, bottom in pixels of the source; None takes the whole picture.
    """

    package: tuple[str, ...]
    source: str
    target: str
    crop: tuple[int, int, int, int] | None = None


PHOTOGRAPHS: Final = (
    Photograph(
        SKIMAGE,
        "astronaut.png",
        "people/a photo of a smiling astronaut in an orange space suit with a flag and a model of a space shuttle.jpg",
    ),
    Photograph(
        SKIMAGE,
        "astronaut.png",
        "people/a portrait photo of a smiling woman with short blond hair in an orange space suit.webp",
        crop=(90, 0, 360, 405),
    ),
    Photograph(
        SKIMAGE,
        "camera.png",
        "people/a black and white photo of a man in a dark coat looking through a camera on a tripod_(1).png",
    ),
    Photograph(
        SKIMAGE,
        "camera.png",
        "people/a black and white photo of a man in a dark coat looking through a camera on a tripod_(2).jpg",
        crop=(0, 40, 352, 512),
    ),
    Photograph(SKIMAGE, "chelsea.png", "animals and plants/a close up photo of a tabby cat with green eyes_(1).jpg"),
    Photograph(
        SKIMAGE,
        "chelsea.png",
        "animals and plants/a close up photo of a tabby cat with green eyes_(2).webp",
        crop=(80, 0, 380, 300),
    ),
    Photograph(
        SKLEARN,
        "flower.jpg",
        "animals and plants/a photo of an orange dahlia flower on a dark green background_(1).jpg",
    ),
    Photograph(
        SKLEARN,
        "flower.jpg",
        "animals and plants/a photo of an orange dahlia flower on a dark green background_(2).png",
        crop=(160, 0, 460, 400),
    ),
    Photograph(
        SKIMAGE,
        "coffee.png",
        "things/a photo of a red cup of espresso on a red saucer with a spoon on a wooden table.webp",
    ),
    Photograph(SKIMAGE, "motorcycle_left.png", "things/a photo of a red motorcycle parked in a garage_(1).jpg"),
    Photograph(SKIMAGE, "motorcycle_right.png", "things/a photo of a red motorcycle parked in a garage_(2).webp"),
    Photograph(SKIMAGE, "coins.png", "things/a black and white photo of four rows of ancient coins.png"),
    Photograph(SKLEARN, "china.jpg", "places/a photo of a red and green pagoda among trees above a lake_(1).jpg"),
    Photograph(
        SKLEARN,
        "china.jpg",
        "places/a photo of a red and green pagoda among trees above a lake_(2).png",
        crop=(50, 0, 370, 427),
    ),
    Photograph(SKIMAGE, "rocket.jpg", "places/a photo of a white rocket on a launch pad at dusk_(1).webp"),
    Photograph(
        SKIMAGE,
        "rocket.jpg",
        "places/a photo of a white rocket on a launch pad at dusk_(2).jpg",
        crop=(170, 67, 470, 427),
    ),
    Photograph(SKIMAGE, "moon.png", "space/a black and white photo of craters on the surface of the moon.png"),
    Photograph(SKIMAGE, "hubble_deep_field.jpg", "space/a telescope photo of many distant galaxies in deep space.webp"),
    Photograph(SKIMAGE, "grass.png", "surfaces/a black and white close up photo of grass with small leaves.png"),
    Photograph(SKIMAGE, "gravel.png", "surfaces/a black and white close up photo of gravel.jpg"),
)
"""The pictures, each caption checked by eye against its picture."""


def package_folder(package: Sequence[str]) -> Path | None:
    """Find a folder inside an installed package, without importing the package.

    Args:
        package: the package's import name, then folder names below it.

    Returns:
        The folder, or None where the package is not installed.
    """
    spec = importlib.util.find_spec(package[0])
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]).joinpath(*package[1:])


def encode(photograph: Photograph, source: Path) -> bytes:
    """Crop a source picture and encode it as its target's format.

    Args:
        photograph: what to cut out and which format to write.
        source: the source picture's path.

    Returns:
        The bytes of the picture file.
    """
    buffer = io.BytesIO()
    with Image.open(source) as picture:
        cut = picture.crop(photograph.crop) if photograph.crop else picture
        cut.save(buffer, **ENCODER_OPTIONS[Path(photograph.target).suffix])
    return buffer.getvalue()


def write_photographs(folder: Path, photographs: Sequence[Photograph] = PHOTOGRAPHS) -> int:
    """Write every photograph that is not there yet, and mend those that differ.

    Args:
        folder: the data root to write below; made if missing. Other files in it are left alone.
        photographs: what to write.

    Returns:
        How many files were written.

    Raises:
        FileNotFoundError: sources are missing; the message names them all, and nothing is written then.
    """
    sources = {}
    missing = []
    for photograph in photographs:
        parent = package_folder(photograph.package)
        source = None if parent is None else parent / photograph.source
        if source is None or not source.is_file():
            missing.append(f"{photograph.source} ({photograph.package[0]})")
        else:
            sources[photograph] = source
    if missing:
        raise FileNotFoundError(
            f"photographs missing from the installed packages: {', '.join(missing)}. "
            "Install them with: python -m pip install -c constraints.txt scikit-image scikit-learn"
        )

    written = 0
    for photograph, source in sources.items():
        target = folder / photograph.target
        content = encode(photograph, source)
        # Comparing contents also mends a file that an interrupted run cut short.
        if target.is_file() and target.read_bytes() == content:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        written += 1
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pictures and say where they are.

    Args:
        argv: arguments without the program's name; None reads the command line.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description="Write the quickstart's captioned photographs.")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="data root to write (default: %(default)s)")
    folder = parser.parse_args(argv).folder
    try:
        written = write_photographs(folder)
    except OSError as problem:
        print(f"prepare_quickstart: {problem}", file=sys.stderr)
        return 2
    print(f"{len(PHOTOGRAPHS)} photographs in {folder} ({written} written now)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
