"""Pushing a run or a checkpoint to the Hub, in one commit, so that it is there whole or not at all.

What is pushed is `hub_contents.gather`'s to say. Objects that arrived before a push was interrupted are not sent
again: the Hub says which it has.
"""

import contextlib
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from transformers import TrainingArguments

from hf_momentum.errors import InputError
from hf_momentum.training.checkpoints import MANIFEST
from hf_momentum.training.hub_client import one_line, patiently, require_token
from hf_momentum.training.hub_contents import LAST, MODEL, STATE, Contents, Item, gather, kind_of_file
from hf_momentum.training.scrubbing import remember_token


@dataclass(frozen=True)
class Pushed:
    """What became of a push.

    Attributes:
        repo_id: "owner/name".
        private: whether only its owner sees it.
        url: of the commit, or of the pull request.
    """

    repo_id: str
    private: bool
    url: str


@dataclass(frozen=True)
class Wishes:
    """How a folder is to be pushed; the fields are the options of `hf-momentum push`.

    Example:
        >>> Wishes("outputs/run", "me/my model", private=True).command()
        "hf-momentum push outputs/run 'me/my model' --private"
    """

    folder: str
    repo_id: str
    private: bool | None = None
    revision: str | None = None
    push_optimizer: bool = False
    commit_message: str | None = None
    create_pr: bool = False
    dtype: str | None = None
    base: str | None = None

    def command(self) -> str:
        """The command line that says the same."""
        words = ["hf-momentum", "push", self.folder, self.repo_id]
        for name in ("private", "push_optimizer", "create_pr"):
            words += [f"--{name}"] if getattr(self, name) else []
        for name in ("revision", "commit_message", "dtype", "base"):
            words += [f"--{name}", value] if (value := getattr(self, name)) is not None else []
        return shlex.join(words)


def push(wishes: Wishes, say: Callable[[str], None] = print) -> Pushed:
    """Push a run, a checkpoint or a folder with a model.

    A repository that exists keeps its visibility; a new one gets the Hub's default, or is private.

    Args:
        wishes: what, where and how.
        say: takes the lines that tell what is pushed.

    Raises:
        InputError: something stands in the way; nothing local is lost, and the line ends with what to do.

    Example:
        >>> push(Wishes("no such folder", "me/model"))
        Traceback (most recent call last):
        ...
        hf_momentum.errors.InputError: no such folder is not a folder; name a run's output folder or a checkpoint
    """
    folder = Path(wishes.folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name a run's output folder or a checkpoint")
    if wishes.create_pr and wishes.revision not in (None, "main"):
        raise InputError("--create_pr opens a pull request against main; leave --revision out")
    kept = f"nothing is lost, all lies in {folder}; then say again: {wishes.command()}"
    with one_line(wishes.repo_id, kept), _staging(folder) as staging:
        repo_id, private = ready(wishes.repo_id, wishes.private, wishes.create_pr)
        contents = gather(folder, staging, wishes.push_optimizer, wishes.dtype, wishes.base)
        say(f"Pushing {folder} to {repo_id} ({'private' if private else 'public'}) at {constants.ENDPOINT}:")
        for line in contents.lines():
            say(line)
        return Pushed(repo_id, private, _commit(wishes, repo_id, contents, say))


def ready(repo_id: str, private: bool | None = None, exists: bool = False) -> tuple[str, bool]:
    """Make the repository unless it exists, and return its whole name and whether it is private.

    Args:
        repo_id: "owner/name", or a name in the namespace of the token's owner.
        private: whether a new one is to be private; None for the Hub's default for the namespace.
        exists: whether it has to exist, as for a pull request.

    Raises:
        InputError: no token, offline, or an existing repository is public and `private` was asked for.
        HfHubHTTPError: no right to write there, or another refusal; `hub_client.one_line` has words for it.
    """
    require_token()
    validate_repo_id(repo_id)
    api = HfApi(token=get_token())
    if "/" not in repo_id:
        repo_id = f"{patiently(api.whoami)['name']}/{repo_id}"
    found = _visibility(api, repo_id)
    if found is None and not exists:
        patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        found = _visibility(api, repo_id)
    if found is None:
        raise InputError(f"{repo_id} is not there, or the token may not see it")
    if not exists:
        _check_right_to_write(api, repo_id)
    if private and not found:
        raise InputError(
            f"{repo_id} exists and is public, and pushing does not change that. Make it private in its settings on the "
            "Hub, name another repository, or leave --private out"
        )
    return repo_id, found


def before_training(training: TrainingArguments) -> Wishes | None:
    """What to push when training is over, if `--push_to_hub` is set; what would stand in its way is said now.

    The token leaves the arguments in any case (`remember_token`).

    Raises:
        InputError: no token, a wrong one, no right to write there.

    Example:
        >>> before_training(TrainingArguments(output_dir="out", use_cpu=True)) is None
        True
    """
    remember_token(training)
    if not training.push_to_hub:
        return None
    wishes = Wishes(
        folder=str(training.output_dir),
        repo_id=training.hub_model_id or Path(str(training.output_dir)).absolute().name,
        private=training.hub_private_repo,
        revision=training.hub_revision,
    )
    if training.process_index == 0:
        with one_line(wishes.repo_id, "nothing was trained yet; leave --push_to_hub out, or mend it"):
            ready(wishes.repo_id, wishes.private)
    return wishes


def _visibility(api: HfApi, repo_id: str) -> bool | None:
    """Whether a repository is private; None if there is none."""
    try:
        return bool(patiently(lambda: api.model_info(repo_id)).private)
    except HfHubHTTPError as error:
        if error.response.status_code == 404:
            return None
        raise


def _check_right_to_write(api: HfApi, repo_id: str) -> None:
    try:
        patiently(lambda: api.auth_check(repo_id, write=True))
    except HfHubHTTPError as error:
        if error.response.status_code != 404:  # a server that does not know the question says it at the commit
            raise


def _commit(wishes: Wishes, repo_id: str, contents: Contents, say: Callable[[str], None]) -> str:
    api = HfApi(token=get_token())
    revision = None if wishes.create_pr else wishes.revision
    if revision is not None and not revision.startswith("refs/"):
        patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    additions = [CommitOperationAdd(item.path, item.content) for item in contents.items]
    there = patiently(lambda: api.list_repo_files(repo_id, revision=revision))
    stale = _stale(there, contents.items)
    if stale:
        say(f"  removed there: {', '.join(stale)} (of an earlier push)")
    # A checkpoint's weights can be those of the model: once they are there, they are not sent a second time.
    for nested in (False, True):
        part = [addition for addition in additions if addition.path_in_repo.startswith(f"{LAST}/") == nested]
        api.preupload_lfs_files(
            repo_id, part, revision=revision, create_pr=wishes.create_pr, num_threads=2, free_memory=False
        )

    def commit() -> str:
        made = api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(path) for path in stale)],
            commit_message=wishes.commit_message or f"hf-momentum push of {Path(wishes.folder).name}",
            revision=revision,
            create_pr=wishes.create_pr,
        )
        return str(made.pr_url if wishes.create_pr else made.commit_url)

    # A commit whose answer was lost can be made twice, a pull request should not.
    return commit() if wishes.create_pr else patiently(commit)


def _stale(there: Iterable[str], items: Sequence[Item]) -> list[str]:
    """What of an earlier push would stand beside these files and be loaded in their place or as theirs.

    These are weights and optimizer states in the same folders, and pickled arguments.
    """
    pushed = {item.path for item in items}
    folders = {Path(item.path).parent for item in items if item.kind in (MODEL, STATE)}
    old = [Path(path) for path in there if path not in pushed and Path(path).parent in folders]
    loaded = [path.as_posix() for path in old if kind_of_file(path.name) in (MODEL, STATE)]
    loaded += [path.as_posix() for path in old if path.name == MANIFEST or path.name.startswith("pytorch_model")]
    pickled = [path for path in there if Path(path).name == "training_args.bin"]
    return sorted({*loaded, *pickled})


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder beside the pushed one for what has to be exported first; made only if used, and gone afterwards."""
    place = folder.resolve().with_name(f".{folder.resolve().name}.hf-momentum-push")
    shutil.rmtree(place, ignore_errors=True)  # of a push that was killed
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
