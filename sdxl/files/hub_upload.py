"""Put a folder on the Hugging Face hub. The only module that uploads to it; does not know what is in the folder."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from sdxl.errors import UploadError, shortened
from sdxl.files.waiting import wait_for

_TOKENS = "https://huggingface.co/settings/tokens"


def check_repository(name: str, called: str = "--push") -> None:
    """Check what can be checked without the hub: the name of the repository, and that there is a token.

    called: the option or input that errors name.

    Raises:
        UploadError: the name is none of a repository, or there is no token.
    """
    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise HFValidationError
    except HFValidationError as error:
        raise UploadError(
            f"{called} {shortened(name)} is not the name of a repository: write owner/name, with letters, digits, -, _ and dots."
        ) from error
    if get_token() is None:
        raise UploadError(
            f"There is no token for the hub: set HF_TOKEN to one with the right to write, from {_TOKENS}."
        )


def check_access(name: str, called: str, *, endpoint: str | None = None) -> None:
    """Ask the hub whether the token may write to the model repository `name`, or create it; create and write nothing.

    Raises:
        UploadError: like `check_repository`; the hub cannot be reached, or the token may not.
    """
    check_repository(name, called)
    api = HfApi(endpoint=endpoint)

    def ask(_: object) -> None:
        try:
            owner = api.whoami()
            try:
                api.auth_check(name, write=True)
            except RepositoryNotFoundError as error:  # a new one: may it be created?
                own = {owner.get("name"), *(one.get("name") for one in owner.get("orgs", []))}
                read_only = owner.get("auth", {}).get("accessToken", {}).get("role") == "read"
                if read_only or name.partition("/")[0] not in own:
                    raise UploadError(_no_right(name)) from error
        except UploadError:
            raise
        except Exception as error:
            raise _explained(error, name) from error

    wait_for(ask, seconds=float("inf"), what="The hub's answer")


def upload(folder: Path, name: str, *, private: bool, endpoint: str | None = None) -> str:
    """Create the model repository `name` if it does not exist, commit everything in `folder` to it, and return its address.

    The token is the one that huggingface_hub finds: `HF_TOKEN`, or that of an earlier login.

    private: whether only the owner may see a new repository. An existing one stays as it is.
    endpoint: the hub's address; by default `HF_ENDPOINT`, or the public hub.

    Raises:
        UploadError: the hub cannot be reached, or refuses.
    """
    check_repository(name)
    api = HfApi(endpoint=endpoint)

    def send(_: object) -> str:
        try:
            address = api.create_repo(name, private=private, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a fine-tune of SDXL")
        except (
            Exception
        ) as error:  # a storage of the hub may raise anything, such as RuntimeError for a refused part
            raise _explained(error, name) from error
        return str(address)

    return wait_for(send, seconds=float("inf"), what="The upload")


def _explained(error: Exception, name: str) -> UploadError:
    """The error of a request to the hub as a sentence for users. Its library wraps some errors in others."""
    chain: list[BaseException] = [error]
    while (behind := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(behind)
    for one in chain:
        if isinstance(one, HfHubHTTPError):
            return UploadError(_refusal(one, name))
        if isinstance(one, HTTPError | ConnectionError | TimeoutError):
            return UploadError(
                f"The hub could not be reached for {name} ({type(one).__name__}): check the connection, HF_ENDPOINT and "
                "HF_HUB_OFFLINE."
            )
    return UploadError(
        f"The hub did not take the files for {name} ({type(error).__name__}): try again later."
    )


def _refusal(error: HfHubHTTPError, name: str) -> str:
    """What the hub's answer means."""
    status = error.response.status_code
    if status == 401:
        return f"The hub does not accept the token for {name}: set HF_TOKEN to a valid one, from {_TOKENS}."
    if status in (403, 404):
        return _no_right(name)
    return f"The hub refused {name} with status {status}: look at the repository, and try again later."


def _no_right(name: str) -> str:
    return (
        f"The token has no right to write to {name}: use your own name or an organisation of yours, and a token with the "
        f"right to write, from {_TOKENS}."
    )
