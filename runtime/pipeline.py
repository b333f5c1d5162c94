"""Image and expressions to masks: ``Pipeline.load``, ``scene = pipe.open(image)``, ``scene.segment(…)``.

Threads: a `Pipeline` may be shared by threads. A `Scene` may too, but answers one call at a time; open one
scene per thread to work side by side.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ppcr import boxes as frames
from ppcr import images
from ppcr.errors import BoxError, ExpressionError
from ppcr.prompts import SemanticPrompt, SpatialPrompt
from runtime.bundle import AUTO, Bundle
from runtime.drawer import Drawer
from runtime.placement import Background
from runtime.prompter import Prompter, Request
from runtime.result import EngineFacts, Result
from runtime.selection import UNGATED, load
from runtime.session import Sessions
from runtime.threads import count_threads
from runtime.timing import Stopwatch

ImageSource = str | os.PathLike[str] | Image.Image | npt.NDArray[Any]
MAX_BOXES = 64
_BOXES = f"give 1 to {MAX_BOXES} boxes, each x1, y1, x2, y2 in pixels"


class Pipeline:
    """A bundle loaded on an engine.

    Args:
        bundle: verified; sessions: both of its models; threads: processors to use; engine: its name.
        parity: what the bundle's manifest says of that engine ("passed", "failed", "ungated").
        passed_over: a line for each faster engine: why it is not that one.
    """

    def __init__(
        self,
        bundle: Bundle,
        sessions: Sessions,
        *,
        threads: int,
        engine: str,
        parity: str = UNGATED,
        passed_over: Sequence[str] = (),
    ) -> None:
        self.bundle, self.sessions, self.threads = bundle, sessions, threads
        self.engine: EngineFacts = {
            "bundle": bundle.manifest.name,
            "precision": sessions.precision or bundle.precision,
            "engine": engine,
            "device": sessions.device,
            "threads": threads,
            "parity": parity,
            "passed_over": list(passed_over),
        }
        # With one thread nothing can run beside the MLLM; the encoder then waits until masks are needed.
        self.background = Background("ppcr-encoder") if threads > 1 else None

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str],
        *,
        precision: str = AUTO,
        threads: int | None = None,
        engine: str = AUTO,
        checkpoint: str | os.PathLike[str] | None = None,
        drafts: bool = True,
    ) -> Pipeline:
        """Read and check a bundle, and start an engine with it.

        Args:
            bundle: its folder.
            precision: "fp32", "int8", …, or "auto" for the default that the build wrote into the bundle; an
                engine with precisions of its own takes another one then, where its parity gate passed.
            threads: processors to use at the same time; default: all that this process may use.
            engine: of ``runtime.session.BACKENDS``, or "auto", the fastest of ``selection.ENGINES`` that
                starts here. One that looked usable and does not start is told by one RuntimeWarning.
            checkpoint: the folder that the bundle was made from, for engines that read its weights; default:
                the checkpoint that comes with the package, where the bundle was made from that.
            drafts: guess stage 1's answer from the words where the bundle has a glossary (`ppcr.drafts`), and
                have the MLLM check the guess instead of writing word by word. Answers are the same.

        Raises:
            BundleError, EngineError, UsageError: each says what to do.
        """
        count = count_threads(threads)
        source = None if checkpoint is None else Path(checkpoint)
        started = load(bundle, engine, precision=precision, threads=count, checkpoint=source)
        return cls(
            started.bundle if drafts else replace(started.bundle, glossary=None),
            started.sessions,
            threads=count,
            engine=started.candidate.name,
            parity=started.candidate.gate,
            passed_over=started.passed_over,
        )

    def open(self, image: ImageSource) -> Scene:
        """Take an image (path, Pillow image, or array as ``ppcr.images.as_rgb`` reads it) to look at.

        The models begin with the first expression. Raises ImageError.
        """
        return Scene(self, image)

    def close(self) -> None:
        """Wait for the background thread and end it. The pipeline cannot open scenes afterwards."""
        if self.background is not None:
            self.background.shutdown(cancel_futures=True)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Scene:
    """One image: its features and the MLLM's cache of it are kept for every expression to come."""

    def __init__(self, pipeline: Pipeline, image: ImageSource) -> None:
        self._pipeline, self._bundle = pipeline, pipeline.bundle
        self._lock = threading.Lock()
        self._opening = Stopwatch()
        with self._opening.stage("image"):
            self.image = images.as_rgb(image)
            self._drawer = Drawer(self._bundle, pipeline.sessions.segmenter, self.image, pipeline.background)
        self._prompter = Prompter(self._bundle, pipeline.sessions.mllm, self.image, self._drawer.start)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the original image."""
        return self.image.shape[0], self.image.shape[1]

    def segment(
        self,
        expression: str,
        *,
        semantic: str | SemanticPrompt | None = None,
        boxes: npt.ArrayLike | None = None,
    ) -> Result:
        """Masks of what ``expression`` names.

        Args:
            semantic: instead of stage 1, "category; attributes; relation; count"; stage 2 goes on from it.
            boxes: instead of stage 2, [K, 4] xyxy in pixels of the original image; their centres serve as
                points. Stage 1 still says what is in them, but no longer how many: its count becomes K.

        Raises:
            ExpressionError, BoxError: empty, too long, malformed, or outside the image.
        """
        request = self._request(expression, semantic, boxes)
        with self._lock:
            return self._segment([request])[0]

    def segment_many(self, expressions: Sequence[str]) -> list[Result]:
        """As `segment` for each expression, all of them at once.

        Where the engine can, stages 1 and 2 of up to `prompter.SIDE_BY_SIDE` of them go on side by side, in
        one KV cache that holds the image once; the masks of all are decoded as one batch. The time of what
        is done for several is shared out equally. All expressions are checked before the first is run.
        """
        requests = [self._request(expression, None, None) for expression in expressions]
        with self._lock:
            return self._segment(requests)

    def _request(
        self, expression: str, semantic: str | SemanticPrompt | None, boxes: npt.ArrayLike | None
    ) -> Request:
        tokenizer, config = self._bundle.tokenizer, self._bundle.config.mllm
        ids = tokenizer.expression(expression, max_tokens=config.max_expression_tokens)
        prompt = None
        if semantic is not None:
            prompt = SemanticPrompt.parse(semantic if isinstance(semantic, str) else semantic.text)
            length, most = len(tokenizer.encode(prompt.text)), self._bundle.manifest.shapes.max_text
            if length > most:
                told = f"the semantic prompt takes {length} tokens, the limit is {most}"
                raise ExpressionError(f"{told}: shorten it")
        spatial = None if boxes is None else self._given_boxes(boxes)
        if prompt is not None and prompt.is_none and spatial is not None:
            raise ExpressionError("the semantic prompt says none, but boxes are given: leave out one of them")
        return Request(expression, tuple(ids), prompt, spatial)

    def _given_boxes(self, boxes: npt.ArrayLike) -> SpatialPrompt:
        try:
            pixels = np.asarray(boxes, np.float32)
        except (TypeError, ValueError) as error:
            raise BoxError(f"cannot read the boxes ({error}): {_BOXES}") from None
        pixels = pixels[None] if pixels.ndim == 1 else pixels
        if pixels.ndim != 2 or pixels.shape[1] != 4 or not 1 <= len(pixels) <= MAX_BOXES:
            raise BoxError(f"cannot use boxes of shape {pixels.shape}: {_BOXES}")
        height, width = self.size
        for box in pixels:
            frames.validate_box(box, width, height)
        unit = frames.to_unit(pixels, width, height)
        return SpatialPrompt(unit, (unit[:, :2] + unit[:, 2:]) / 2)

    def _segment(self, requests: Sequence[Request]) -> list[Result]:
        # The first expression answers for reading the image as well.
        watches = [self._opening, *(Stopwatch() for _ in requests[1:])]
        self._opening = Stopwatch()
        answers = self._prompter.answer_all(requests, watches)
        drawn = self._drawer.draw(answers, watches)
        return [
            Result(
                expression=request.expression,
                image=self.image,
                semantic=answer.semantic,
                spatial=answer.spatial,
                instances=instances,
                scores=scores,
                timings=watch.finish(),
                costs=answer.costs,
                given=request.given,
                engine=self._pipeline.engine,
            )
            for request, answer, watch, (instances, scores) in zip(
                requests, answers, watches, drawn, strict=True
            )
        ]
