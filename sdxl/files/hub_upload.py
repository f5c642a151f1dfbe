"""Put a folder on the Hugging Face hub. The only module that uploads anything; does not know what is in the folder."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from sdxl.errors import UploadError, shortened

_TOKENS = "https://huggingface.co/settings/tokens"


def check_repository(name: str) -> None:
    """Check what can be checked before any work: the name of the repository, and that there is a token.

    Raises:
        UploadError: the name is none of a repository, or there is no token.
    """
    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise HFValidationError
    except HFValidationError as error:
        raise UploadError(
            f"--push {shortened(name)} is not the name of a repository: write owner/name, with letters, digits, -, _ and dots."
        ) from error
    if get_token() is None:
        raise UploadError(
            f"There is no token for the hub: set HF_TOKEN to one with the right to write, from {_TOKENS}."
        )


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
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a fine-tune of SDXL")
    except HfHubHTTPError as error:
        raise UploadError(_refusal(error, name)) from error
    except (HTTPError, OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        raise UploadError(
            f"The hub could not be reached for {name} ({type(error).__name__}): check the connection, HF_ENDPOINT and "
            "HF_HUB_OFFLINE."
        ) from error
    return str(address)


def _refusal(error: HfHubHTTPError, name: str) -> str:
    """What the hub's answer means."""
    status = error.response.status_code
    if status == 401:
        return f"The hub does not accept the token for {name}: set HF_TOKEN to a valid one, from {_TOKENS}."
    if status in (403, 404):
        return (
            f"The token has no right to write to {name}: use your own name or an organisation of yours, and a token with the "
            f"right to write, from {_TOKENS}."
        )
    return f"The hub refused {name} with status {status}: look at the repository, and try again later."
