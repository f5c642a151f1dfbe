"""What all parts of the page share: the projects, the process that draws, and how errors reach people.

Knows who is asked for what; does not know components.
"""

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio

from sdxl.errors import UserInputError
from sdxl.studio.choices import SMALLEST_REAL_BASE, Resolve
from sdxl.studio.drawing import Drawer
from sdxl.studio.picture_set import PictureSet
from sdxl.studio.projects import Project, Projects
from sdxl.studio.trainings import Training, all_of, latest
from sdxl.studio.views import as_message

log = logging.getLogger(__name__)

PRIVATE = "private"
"""Gradio's name for events that only the page calls."""


@dataclass(frozen=True, kw_only=True)
class Studio:
    """What the page works with."""

    projects: Projects
    drawer: Drawer
    resolve: Resolve
    base: str
    """The name of the base, as people gave it."""

    def project(self, key: str) -> Project:
        """The project of a page.

        Raises:
            UserInputError: the page names none.
        """
        return self.projects.require(key)

    def side(self, project: Project) -> int:
        """The size of a project's pictures in pixels, that of the base; 1024 as long as there are none."""
        pictures = PictureSet(project).pictures
        return min((min(one.target_size) for one in pictures), default=1024)

    def is_miniature(self, project: Project) -> bool:
        """Whether the base is the small one."""
        training = latest(project)
        side = training.resolved.get("resolution") if training else None
        return int(side or self.side(project)) < SMALLEST_REAL_BASE

    def finished(self, project: Project) -> list[tuple[str, str]]:
        """(what people see, path) of the fine-tunes of a project, the newest first."""
        name = project.about.name or project.about.word
        return [(f"{name}, training {one.number}", str(one.result)) for one in self.results(project)]

    def results(self, project: Project) -> list[Training]:
        """The finished trainings of a project, the newest first."""
        return [one for one in all_of(project) if one.result.is_file()]

    def everything_else(self, project: Project) -> list[tuple[str, str]]:
        """(what people see, path) of the fine-tunes of all other projects."""
        return [
            (f"{shown}, training {one.number}", str(one.result))
            for shown, key in self.projects.all()
            if key != project.key
            for one in self.results(self.projects.require(key))
        ]


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """A handler, perhaps one that yields, whose errors are shown in the page: sentences for people as they are, others with
    their place in the log."""

    @functools.wraps(function)
    def handler(*inputs: Any) -> Any:
        with _shown_in_the_page():
            return function(*inputs)

    @functools.wraps(function)
    def yielding(*inputs: Any) -> Any:
        with _shown_in_the_page():
            yield from function(*inputs)

    return yielding if inspect.isgeneratorfunction(function) else handler


@contextlib.contextmanager
def _shown_in_the_page() -> Iterator[None]:
    try:
        yield
    except gradio.Error:
        raise
    except Exception as error:
        sentence = str(error)
        if not isinstance(error, UserInputError):
            log.exception("A part of the page failed.")
            sentence = (
                f"Something unexpected happened ({type(error).__name__}). The terminal has the details."
            )
        raise gradio.Error(as_message(sentence), duration=None, print_exception=False) from error
