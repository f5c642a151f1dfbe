"""Files of finished trainings as addresses of the page, so that gigabytes are not copied before a download.

Knows which files may be fetched; does not know the page.
"""

from pathlib import Path
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response

from sdxl.errors import UserInputError
from sdxl.studio.projects import Project, Projects
from sdxl.workspace import REPORT

ROUTE = "/files/{project}/{path:path}"
_KINDS = (".tar", ".zip", ".safetensors", ".html")


def address_of(project: Project, path: Path) -> str:
    """The address of a file in the folder of the project's trainings."""
    return f"/files/{project.key}/{quote(str(path.relative_to(project.trainings)))}"


def answer(projects: Projects, request: Request) -> Response:
    """The file that an address names: only what a training made, only in that project's folder."""
    try:
        trainings = projects.require(request.path_params["project"]).trainings.resolve()
    except UserInputError:
        return PlainTextResponse("There is no such project.", status_code=404)
    path = (trainings / request.path_params["path"]).resolve()
    if not path.is_relative_to(trainings) or path.suffix not in _KINDS or not path.is_file():
        return PlainTextResponse("There is no such file.", status_code=404)
    kind = "inline" if path.name == REPORT else "attachment"
    return FileResponse(path, filename=path.name, content_disposition_type=kind)
