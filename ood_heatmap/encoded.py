"""Reader of encoded images: bytes from any storage, decoded with Pillow."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from ood_heatmap.errors import printable
from ood_heatmap.images import unreadable

# Pillow stores a pointer per line: a small file of one very tall column would exhaust the memory
_MAX_SIDE = 2**20


@dataclass(frozen=True)
class EncodedReader:
    """Reads images from the bytes of image files; thread-safe if ``fetch`` is.

    Args:
        fetch: Maps a row to bytes; raises ``OSError`` or ``ValueError`` on failure.
        name_of: Maps a row to the name of the image, for messages.
    """

    fetch: Callable[[int], bytes]
    name_of: Callable[[int], str]

    def read(self, row: int) -> tuple[Image.Image, bytes]:
        """Return the decoded image and the sha256 of its bytes.

        Raises:
            UnreadableImageError: The image cannot be read; names the image.
        """
        content = self._content(row)
        try:
            image = _decode(content)
        except MemoryError:
            raise
        except Exception as error:
            # on damaged bytes Pillow's readers can raise anything
            raise unreadable(printable(self.name_of(row)), error) from error
        return image, hashlib.sha256(content).digest()

    def digest(self, row: int) -> bytes:
        """Return only the sha256."""
        return hashlib.sha256(self._content(row)).digest()

    def _content(self, row: int) -> bytes:
        try:
            return self.fetch(row)
        except (OSError, ValueError) as error:
            raise unreadable(printable(self.name_of(row)), error) from error


def _decode(content: bytes) -> Image.Image:
    """Decode the bytes of an image file."""
    # reads only the header
    image = Image.open(io.BytesIO(content))
    num_pixels = image.width * image.height
    if num_pixels > (Image.MAX_IMAGE_PIXELS or num_pixels) or max(image.size) > _MAX_SIDE:
        raise ValueError(f"{image.width} x {image.height} pixels would exhaust the memory")
    image.load()
    return image
