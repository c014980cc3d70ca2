"""The case `jpeg-pipeline` of benchmarks.vision: JPEGs out of webdataset shards, decoded and resized, on one CPU core.

The pictures are made, 640 x 480 at quality 90 and some 160 KB each, as COCO's are: coloured noise whose power falls with the
square of the frequency as that of photographs does, for a smooth picture would decode too fast and white noise too slowly.
The rule is CLIP's, 224 x 224. Speed is pictures over CPU seconds of the process, user and system, so that a shared machine's
other work is not counted against a core; wall seconds stand beside it. `plain` is tarfile, Pillow and transformers' CLIP
processor on the same shards, in turns; it also normalises. `cached` is what an epoch reads after the preparer's work.
"""

import io
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.results import Results
from benchmarks.serve import spread_of
from core.data.findings import Findings
from core.data.pictures.archive import read_archive
from core.data.pictures.cache import PictureCache, write_picture_cache
from core.data.pictures.decode import decode_picture
from core.data.pictures.resize import ResizeRule

RULE = ResizeRule(224, (224, 224))
HEIGHT, WIDTH, QUALITY = 480, 640, 90
SHARDS = 2
BATCH = 64


def measure(results: Results, case: str, must: float | None, aim: float | None, work: Path, *, pictures: int, turns: int) -> None:
    """Add the rows of the case."""
    shards = [_shard(work / f"{number}.tar", pictures // SHARDS, seed=number) for number in range(SHARDS)]
    ours: list[tuple[float, float]] = []
    plain: list[tuple[float, float]] = []
    for turn in range(turns + 1):
        pair = _timed(lambda: sum(map(_read, shards))), _timed(lambda: sum(map(_read_plainly, shards)))
        if turn:  # the first warms up
            ours.append(pair[0])
            plain.append(pair[1])
    options: dict[str, Any] = {"better": "higher", "n": turns}
    by_core = [speed for speed, _ in ours]
    results.add(
        case,
        "samples_per_core_second",
        float(np.median(by_core)),
        "samples/s",
        spread=spread_of(by_core),
        must=must,
        aim=aim,
        **options,
    )
    results.add(case, "samples_per_wall_second", float(np.median([wall for _, wall in ours])), "samples/s", **options)
    results.add(case, "plain_samples_per_core_second", float(np.median([speed for speed, _ in plain])), "samples/s", **options)
    cached = [_timed(lambda: _read_cache(work / "cache")) for _ in range(turns)] if _write(shards[0], work / "cache") else []
    results.add(case, "cached_samples_per_core_second", float(np.median([speed for speed, _ in cached])), "samples/s", **options)


def _timed(run: Callable[[], int]) -> tuple[float, float]:
    """(pictures per CPU second, per wall second)."""
    wall, cpu = time.perf_counter(), time.process_time()
    count = run()
    return count / (time.process_time() - cpu), count / (time.perf_counter() - wall)


def _read(shard: Path) -> int:
    findings = Findings()
    shapes = [
        RULE.apply(decode_picture(data, name).image).shape
        for name, data in read_archive(shard, findings)
        if name.endswith(".jpg")
    ]
    assert set(shapes) == {(224, 224, 3)}
    assert not findings.error_count
    return len(shapes)


def _read_plainly(shard: Path) -> int:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil()
    shapes = []
    with tarfile.open(shard) as archive:
        for member in archive:
            if member.name.endswith(".jpg"):
                file = archive.extractfile(member)
                assert file is not None
                with Image.open(io.BytesIO(file.read())) as image:
                    shapes.append(processor(image.convert("RGB"), return_tensors="np")["pixel_values"].shape)
    assert set(shapes) == {(1, 3, 224, 224)}
    return len(shapes)


def _write(shard: Path, folder: Path) -> int:
    members = list(read_archive(shard, Findings()))
    rows = [(number, name) for number, (name, _) in enumerate(members, start=1) if name.endswith(".jpg")]
    return write_picture_cache(folder, members, rows, RULE, {})


def _read_cache(folder: Path) -> int:
    """Every picture twenty times over, in batches of a shuffled order."""
    cache = PictureCache(folder, {})
    order = np.random.default_rng(0).permutation(np.tile(np.arange(len(cache)), 20)).tolist()
    batches = (order[at : at + BATCH] for at in range(0, len(order), BATCH))
    return sum(len(np.stack([cache.picture(index) for index in batch])) for batch in batches)


def _shard(path: Path, pictures: int, seed: int) -> Path:
    random = np.random.default_rng(seed)
    with tarfile.open(path, "w") as archive:
        for number in range(pictures):
            file = io.BytesIO()
            Image.fromarray(_photo(random)).save(file, "JPEG", quality=QUALITY)
            for end, data in (("jpg", file.getvalue()), ("txt", b"a made picture")):
                info = tarfile.TarInfo(f"{number:06}.{end}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def _photo(random: np.random.Generator) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 [HEIGHT, WIDTH, 3] of 1/f amplitude; the channels share most of it, as those of a photograph do."""
    down, across = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None]
    falling = 1 / np.maximum(np.hypot(down, across), 1 / WIDTH)

    def field() -> Any:
        made = np.fft.irfft2(np.fft.rfft2(random.standard_normal((HEIGHT, WIDTH))) * falling, s=(HEIGHT, WIDTH))
        return made / made.std()

    grey = field()
    pixels = np.stack([128 + 38 * grey + 8 * field() for _ in range(3)], axis=-1)
    return np.clip(pixels, 0, 255).astype(np.uint8)
