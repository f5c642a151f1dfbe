"""Which repositories on the hub a training's result may go to. Knows names and the operator's setting; imports nothing heavy."""

from sdxl import settings
from sdxl.errors import UploadError


def require_pushable(repository: str, name: str) -> None:
    """Check before any work that the repository may be pushed to, and that the hub would take it.

    Behind a server the token is the operator's, so strangers push only to owners that `SDXL_PUSH_OWNERS` names.

    name: the input's name.

    Raises:
        UploadError: the name is none of a repository, the operator does not allow it, there is no token, the hub cannot be
            reached, or the token may not write there.
    """
    if settings.behind_server() and not _is_opened(repository):
        raise UploadError(
            f"{name} is not opened for that owner on this server, whose operator lists owners in SDXL_PUSH_OWNERS: leave {name} "
            "out, or use upload_url."
        )
    from sdxl.files.hub_upload import check_access  # here: the hub's library takes a while to import

    check_access(repository, name)


def _is_opened(repository: str) -> bool:
    """Whether the repository's owner is one that strangers may push to. The hub ignores upper and lower case."""
    return repository.partition("/")[0].lower() in {owner.lower() for owner in settings.push_owners()}
