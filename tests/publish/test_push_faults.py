"""push against a Hub that refuses, stalls, loses its replies or answers as another server would."""

import pytest
from loopback_hub import TOKEN, Fault, Repo

pytest_plugins = ["push_case"]

STALLS = [
    ("POST", "/repos/create"),
    ("POST", "/validate-yaml"),
    ("POST", "/preupload/"),
    ("POST", "/objects/batch"),
    ("PUT", "/lfs/"),
    ("POST", "/commit/"),
]


@pytest.mark.parametrize("endpoint", [*STALLS, ("GET", "/api/models/")], ids=lambda endpoint: endpoint[1])
def test_a_hub_that_does_not_answer_ends_a_push(push, hub, artifact, endpoint):
    hub.faults.append(Fault(*endpoint, times=100, stalled=True))
    refused = push(artifact, "alice/tiny", stalled=True, private=False)
    assert refused.code == 2 and "timed out" in refused.data["what"] and "again" in refused.data["hint"]
    assert 2 <= sum(request[0] == endpoint[0] and endpoint[1] in request[1] for request in hub.requests) <= 6
    hub.faults.clear()
    assert push(artifact, "alice/tiny").code == 0


# The requests that huggingface_hub does not repeat by itself.
@pytest.mark.parametrize("path", ["/repos/create", "/validate-yaml", "/commit/"])
def test_a_hub_that_stalls_once_is_asked_again(push, hub, artifact, path):
    hub.faults.append(Fault("POST", path, stalled=True))
    assert push(artifact, "alice/tiny", stalled=True).code == 0
    assert "model.safetensors" in hub.repos["alice/tiny"].files()


def test_a_commit_whose_reply_was_lost_is_not_made_again(push, hub, artifact):
    hub.faults.append(Fault("POST", "/commit/", lost=True))
    pushed = push(artifact, "alice/tiny", stalled=True)
    assert pushed.code == 0 and pushed.data["commit"] == hub.repos["alice/tiny"].refs["main"]
    assert len(hub.repos["alice/tiny"].messages) == 2


@pytest.mark.parametrize("status", [0, 504, 200])  # no answer, that of a proxy, and one without an address
def test_a_pull_request_whose_reply_was_lost_is_not_opened_again(push, hub, artifact, status):
    repo = hub.repos["bob/tiny"] = Repo()
    assert push(artifact, "bob/tiny", create_pr=True).data["pull_request"].endswith("/1")
    hub.faults.append(Fault("POST", "/commit/", status, lost=True))
    pushed = push(artifact, "bob/tiny", create_pr=True, stalled=True)
    assert pushed.code == 0, pushed.output
    assert pushed.data["pull_request"] == f"{hub.url}/bob/tiny/discussions/2"
    assert pushed.data["commit"] == repo.refs["refs/pr/2"] and len(repo.pull_requests) == 2


def test_a_pull_request_that_may_be_open_is_told(push, hub, artifact):
    repo = hub.repos["bob/tiny"] = Repo()
    hub.faults.append(Fault("POST", "/commit/", times=100, stalled=True))
    refused = push(artifact, "bob/tiny", create_pr=True, stalled=True)
    assert refused.code == 2 and "bob/tiny/discussions first" in refused.data["hint"]
    assert sum("/commit/" in path for _, path in hub.requests) == 1 and not repo.pull_requests


def test_a_repository_that_exists_needs_no_address(push, hub, artifact):
    hub.repos["alice/tiny"] = Repo()
    hub.faults.append(Fault("POST", "/create", 409, body=b'{"error": "You already created this model repo"}'))
    assert push(artifact, "alice/tiny").code == 0


HTML = b"<html>Sign in to the network</html>"


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        *(
            ("POST", path, HTML)
            for path in ("/create", "/validate-yaml", "/preupload/", "/batch", "/commit/")
        ),
        *(("GET", "/whoami", HTML), ("POST", "/create", b"[]"), ("POST", "/preupload/", b"{}")),
        ("POST", "/commit/", b""),
    ],
)
def test_an_answer_that_is_not_the_hubs_is_told(push, hub, artifact, method, path, body):
    hub.faults.append(Fault(method, path, 200, times=100, body=body))
    refused = push(artifact, "tiny" if path == "/whoami" else "alice/tiny")
    assert refused.code == 2 and "again" in refused.data["hint"], refused.output


@pytest.mark.parametrize(
    ("fault", "what", "hint"),
    [
        (Fault("PUT", "/lfs/", 403), "the upload to alice/tiny broke off", "not sent twice"),
        (Fault("POST", "/commit/", 503), "HTTP 503", "busy"),
        (
            Fault("POST", "/validate-yaml", 400, message="base_model is wrong"),
            "base_model is wrong",
            "Correct that",
        ),
    ],
    ids=lambda value: value.path if isinstance(value, Fault) else "",
)
def test_a_push_that_fails_changes_nothing_and_can_be_repeated(push, hub, artifact, fault, what, hint):
    hub.faults.append(fault)
    refused = push(artifact, "alice/tiny")
    assert refused.code == 2 and what in refused.data["what"] and hint in refused.data["hint"]
    assert list(hub.repos["alice/tiny"].files()) == [".gitattributes"]
    assert push(artifact, "alice/tiny").code == 0
    assert "model.safetensors" in hub.repos["alice/tiny"].files()


@pytest.mark.parametrize("token", [TOKEN, "api_org_OfTheOldForm"])
def test_a_token_that_the_hub_repeats_is_not_shown(push, hub, artifact, token):
    hub.tokens[token] = "alice"
    hub.faults.append(Fault("GET", "/tree/", 404, message=f"{token} is not hf_someoneElsesToken"))
    refused = push(artifact, "alice/tiny", token=token)
    assert "hf_... is not hf_..." in refused.data["what"]
    assert token not in refused.output and "hf_someone" not in refused.output
