"""Drawn pictures become files: judge, mark, save.

Knows judges, the watermark and file formats; does not know how pictures are drawn.
"""

import logging
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from PIL import Image

from sdxl.errors import WithheldError
from sdxl.serving import watermark
from sdxl.serving.masks import surroundings_of
from sdxl.serving.picture_files import describe, save
from sdxl.serving.request import DeliveryOptions, GenerationRequest
from sdxl.serving.safety import Judge

log = logging.getLogger(__name__)


class Delivery:
    """Delivers the pictures of requests."""

    def __init__(self, judge: Judge, *, model: str) -> None:
        """`model` is the base's name, for the metadata."""
        self.judge, self.model = judge, model

    def deliver(
        self,
        pictures: Generator[Image.Image],
        requests: Sequence[GenerationRequest],
        options: DeliveryOptions,
        folder: Path,
    ) -> list[Path]:
        """Write the `pictures` of all `requests` into `folder` as `out-0.png`, `out-1.png`, …; return the files.

        Threads work on a picture while `pictures` draws the next one. A picture that is judged unsafe gets no file.

        Raises:
            WithheldError: all pictures are unsafe.
        """
        judge = None if options.disable_safety_checker else self.judge
        places = [(request, number) for request in requests for number in range(request.num_outputs)]
        # Two threads per picture: one marks and saves it and waits for the other, which judges it.
        with closing(pictures), ThreadPoolExecutor(max_workers=2 * len(places)) as threads:

            def finish(index: int, picture: Image.Image) -> Path | None:
                """Judge, mark and save a picture; None if it is unsafe."""
                request, number = places[index]
                unsafe = judge is not None and threads.submit(judge.is_unsafe, picture)
                if options.apply_watermark:
                    picture = _marked(picture, request)
                if unsafe and unsafe.result():
                    return None
                parameters = describe(request, number, model=self.model) if options.embed_metadata else None
                file = folder / f"out-{index}.{options.output_format}"
                save(picture, file, quality=options.output_quality, parameters=parameters)
                return file

            under_way = [threads.submit(finish, *drawn) for drawn in enumerate(pictures)]
            results = [one.result() for one in under_way]
        files = [file for file in results if file is not None]
        if judge is not None:
            log.info("%s judged: %d of %d withheld", judge.name, len(results) - len(files), len(results))
        if not files:
            raise WithheldError(
                "All pictures were withheld as not safe for work: try another prompt or seed."
            )
        return files


def _marked(picture: Image.Image, request: GenerationRequest) -> Image.Image:
    """`picture` with the watermark; the part that inpainting keeps stays without it."""
    marked = watermark.embed(picture)
    around = surroundings_of(request)
    return marked if around is None else around.keep_outside(marked)
