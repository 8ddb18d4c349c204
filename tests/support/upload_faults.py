"""Pushes against a Hub with random faults, in one process: `python upload_faults.py FIRST COUNT`.

Each number stands for a state of the repository, some faults and options of push. A push must end complete and equal
in every byte, or with one clear error; the same command without faults then completes. No partial revision is ever on
`main`, and no second pull request is opened. Prints the number of pushes that failed at first.
"""

import os
import random
import sys
import tempfile
import time
from pathlib import Path

from fake_artifact import save_weights, write_artifact
from loopback_hub import TOKEN, Fault, LoopbackHub, Repo

LONGEST = 20.0  # seconds of one push; waits are cut to 0.3 s for each of the client's repetitions
ENDPOINTS = [
    *(("GET", "/whoami"), ("POST", "/repos/create"), ("POST", "/validate-yaml"), ("POST", "/preupload/")),
    *(("POST", "/objects/batch"), ("PUT", "/lfs/"), ("POST", "/commit/"), ("GET", "/api/models/")),
    *(("GET", "/tree/"), ("GET", "/discussions")),
]
STATUSES = (401, 403, 404, 409, 412, 413, 429, 500, 502, 503, 504)
HTML = b"<html>Sign in to the network</html>"


def random_fault(rng: random.Random) -> Fault:
    method, path = rng.choice(ENDPOINTS)
    times = rng.choice([1, 1, 1, 2, 100])
    kinds = [
        dict(status=rng.choice(STATUSES)),
        dict(status=rng.choice(STATUSES)),
        dict(lost=True),
        dict(lost=True, status=504),
        dict(stalled=True),
        dict(reset=True),
        dict(truncated=True),
        dict(slow=True),
        # A list of files that is empty in spite of them is no fault that a client could notice.
        dict(status=200, body=rng.choice([HTML, b"", *([b"{}", b"[]"] if method != "GET" else [])])),
    ]
    return Fault(method, path, times=times, **rng.choice(kinds))


def attempt(hub: LoopbackHub, folder: Path, number: int) -> bool:
    """Push with faults, and again without if that failed. Return True if it failed at first."""
    from linearize_cli.artifact.completeness import artifact_files
    from linearize_cli.errors import UserError
    from linearize_cli.publish.push import push

    rng = random.Random(number)
    hub.repos.clear()
    hub.objects.clear()
    create_pr = rng.random() < 0.3
    wanted = {name: (folder / name).read_bytes() for name in artifact_files(folder)}
    if create_pr or rng.random() < 0.5:
        repo = hub.repos["alice/tiny"] = Repo()
        if rng.random() < 0.5:  # an earlier version is there
            old = {"README.md": b"old", "model-00001-of-00002.safetensors": b"old", "notes.txt": b"mine"}
            repo.commit("main", repo.files() | old, "earlier")
    first = dict(hub.repos["alice/tiny"].files()) if hub.repos else {}
    hub.faults = [random_fault(rng) for _ in range(rng.choice([1, 1, 2, 3]))]

    def run() -> str | None:
        started = time.monotonic()
        try:
            push(folder, "alice/tiny", verify=False, create_pr=create_pr)
        except UserError as error:
            assert error.hint and len(str(error).splitlines()) <= 10, (number, str(error))
            return str(error)
        finally:
            assert time.monotonic() - started < LONGEST, (number, hub.faults)
        return None

    def done() -> bool:
        """All files are there, in `main` or in a pull request."""
        repo = hub.repos.get("alice/tiny")
        where = [f"refs/pr/{request['num']}" for request in repo.pull_requests] if create_pr else ["main"]
        return any(all(repo.files(ref).get(name) == data for name, data in wanted.items()) for ref in where)

    def check() -> None:
        repo = hub.repos.get("alice/tiny")
        for files in [] if repo is None else repo.commits.values():
            if wanted.keys() & files.keys() and files != first:
                assert all(files.get(name) == data for name, data in wanted.items()), number
                assert not any("-of-" in name for name in files), number
                assert files.get("notes.txt") == first.get("notes.txt"), number
        if create_pr and repo:
            assert len(repo.pull_requests) <= 1 and repo.files() == first, number

    failed = run()
    check()
    if failed is None:
        assert done(), number
    hub.faults = []
    if failed and not ("discussions first" in failed and done()):
        assert (again := run()) is None, (number, failed, again)
        assert done(), number
        check()
    return bool(failed)


def main(first: int, count: int) -> None:
    with LoopbackHub({TOKEN: "alice"}) as hub, tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
        }
        os.environ |= {
            "HF_HOME": f"{folder}/hf",
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        from linearize_cli import hub as waits

        waits.TIMEOUT = dict.fromkeys(waits.TIMEOUT, 0.3)
        time.sleep = lambda seconds: None
        artifact = write_artifact(Path(folder, "tiny"))
        save_weights(artifact / "model.safetensors", seed=first)
        print(sum(attempt(hub, artifact, number) for number in range(first, first + count)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
