"""Draw the pictures of the documentation from a run: panels of photographs, one below the other.

python docs/images/make.py RUN docs/images/photos/*.jpg --out docs/images/panels.jpg
"""

from pathlib import Path

import click
from PIL import Image

from ood_heatmap import HeatmapDetector


@click.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.argument("photos", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The JPEG file.")
def main(run: Path, photos: tuple[Path, ...], out: Path) -> None:
    """Draw the panels that ``ood-heatmap predict --nearest 1`` draws of PHOTOS."""
    result = HeatmapDetector.load(run)(photos, nearest=1)
    panels = [result.plot(row) for row in range(len(result))]
    size = max(panel.width for panel in panels), sum(panel.height for panel in panels)
    canvas, top = Image.new("RGB", size, "white"), 0
    for panel in panels:
        canvas.paste(panel, (0, top))
        top += panel.height
    canvas.save(out, quality=88, optimize=True)


if __name__ == "__main__":
    main()
