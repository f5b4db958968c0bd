"""A revoked site stays out until an operator says otherwise. Tokens are listed and ended."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from central.cli import main
from central.journal import EventKind
from edge_node.identity import JoinToken
from protos.operators.v1 import operators_pb2
from tests.contract import central_harness as harness
from tests.contract.central_harness import Central, Node, refusal


async def revoke(central: Central, node: Node) -> operators_pb2.RevokeNodeResponse:
    return await central.operators.RevokeNode(
        operators_pb2.RevokeNodeRequest(node_id=node.node_id), timeout=20
    )


async def tokens(central: Central) -> dict[str, operators_pb2.Token]:
    answer = await central.operators.ListTokens(operators_pb2.ListTokensRequest(), timeout=20)
    return {token.token_id: token for token in answer.tokens}


async def readmitting(central: Central, node_id: str, cohort: str = "shared") -> JoinToken:
    request = operators_pb2.CreateTokenRequest(
        cohort=cohort, uses=1, valid_s=3600, readmit_node_id=node_id
    )
    return JoinToken.parse((await central.operators.CreateToken(request, timeout=20)).token)


async def test_a_revoked_site_does_not_come_back_with_its_token(central: Central) -> None:
    token, other_token = await central.token(uses=3), await central.token(uses=3)
    key, new = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    site, neighbour = (
        await central.enroll("site", token, key),
        await central.enroll("neighbour", token),
    )
    done = await revoke(central, site)
    assert (done.token_id, done.ended_uses, list(done.other_node_ids)) == (
        token.token_id,
        1,
        [neighbour.node_id],
    )
    again = await revoke(central, site)
    assert (again.token_id, again.ended_uses) == (token.token_id, 0), "it ended once"
    for name, own_key, used in (
        ("site", new, token),  # the name, with a new key
        ("elsewhere", new, token),  # neither: the token is over
        ("site", key, token),
        (
            "elsewhere",
            key,
            other_token,
        ),  # the key under another name, with a token that still has uses
        ("site", key, other_token),
        ("site", new, other_token),
        ("SITE", new, other_token),
    ):
        code, why, text = await refusal(central.enroll(name, used, own_key))
        assert code is grpc.StatusCode.PERMISSION_DENIED, (name, text)
        assert why in ("BAD_TOKEN", "REVOKED_NODE"), text
    assert "is revoked: its node" in (await refusal(central.enroll("elsewhere", token, new)))[2]
    with central.rooms.journal.read() as state:
        assert list(state.nodes) == [site.node_id, neighbour.node_id]
    assert (await neighbour.query("0" * 64)).committed_bytes == 0, (
        "who came with the same token stays"
    )


async def test_a_lost_answer_is_no_reason_to_stay_out(central: Central) -> None:
    """A revoked node's neighbour enrolled, lost the answer, and tries the ended token again."""
    token = await central.token(uses=3)
    key = ec.generate_private_key(ec.SECP256R1())
    site, neighbour = (
        await central.enroll("site", token),
        await central.enroll("neighbour", token, key),
    )
    await revoke(central, site)
    assert (await central.enroll("neighbour", token, key)).node_id == neighbour.node_id


async def test_a_key_is_one_node(central: Central) -> None:
    """Or a site would enrol twice before it is revoked, and stay in under the other name."""
    token, key = await central.token(), ec.generate_private_key(ec.SECP256R1())
    node = await central.enroll("a", token, key)
    code, why, text = await refusal(central.enroll("b", token, key))
    assert (code, why, node.node_id in text) == (grpc.StatusCode.ALREADY_EXISTS, "KEY_TAKEN", True)
    assert (await tokens(central))[token.token_id].used == 1


async def test_an_operators_word_brings_a_site_back(central: Central) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    site = await central.enroll("site", await central.token(), key)
    with_it = operators_pb2.CreateTokenRequest(
        cohort="shared", uses=1, valid_s=60, readmit_node_id=site.node_id
    )
    code, why, text = await refusal(central.operators.CreateToken(with_it, timeout=20))
    assert (code, why, "is not revoked" in text) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "BAD_ARGUMENT",
        True,
    )
    await revoke(central, site)
    token = await readmitting(central, site.node_id)
    code, why, text = await refusal(central.enroll("site", token, key))
    assert (why, "its key is never enrolled again" in text) == ("REVOKED_NODE", True)
    back = await central.enroll("site", token)
    assert (await back.query("0" * 64)).committed_bytes == 0
    assert (await refusal(site.query("0" * 64)))[1] == "REVOKED_NODE", "the old key stays out"
    assert (await refusal(central.enroll("site", await central.token())))[1] == "NAME_TAKEN"
    await revoke(central, back)
    assert (await refusal(central.enroll("site", await central.token())))[1] == "REVOKED_NODE"
    moved = await central.enroll("site", await readmitting(central, back.node_id, "zeta"))
    assert moved.answer.cohort == "zeta"


async def test_an_operators_word_does_not_outlive_the_next_revocation(central: Central) -> None:
    """Two words were given; the site came back with one and was revoked again."""
    site = await central.enroll("site", await central.token())
    await revoke(central, site)
    first, second = [await readmitting(central, site.node_id) for _ in range(2)]
    back = await central.enroll("Site", first)
    await revoke(central, back)
    code, why, text = await refusal(central.enroll("site", second))
    assert (code, why) == (grpc.StatusCode.PERMISSION_DENIED, "BAD_TOKEN"), text
    assert f"{back.node_id}, was revoked later" in text


async def test_a_whole_token_in_the_place_of_its_id_is_quoted_nowhere(central: Central) -> None:
    created = await central.operators.CreateToken(
        operators_pb2.CreateTokenRequest(cohort="shared", uses=1, valid_s=3600), timeout=20
    )
    text = (
        await refusal(
            central.operators.RevokeToken(operators_pb2.RevokeTokenRequest(token_id=created.token))
        )
    )[2]
    assert created.token[:16] in text
    assert created.token[:17] not in text


async def test_tokens_are_listed_and_ended(central: Central) -> None:
    used_up, ended, usable = (
        await central.token(uses=1),
        await central.token("zeta"),
        await central.token(uses=2),
    )
    node, late = await central.enroll("a", used_up), await central.enroll("d", ended)
    request = operators_pb2.RevokeTokenRequest(token_id=ended.token_id)
    for _ in range(2):
        done = (await central.operators.RevokeToken(request, timeout=20)).token
        assert (done.state, list(done.node_ids)) == (
            operators_pb2.TOKEN_STATE_REVOKED,
            [late.node_id],
        )
    listed = await tokens(central)
    states = {
        used_up.token_id: operators_pb2.TOKEN_STATE_USED_UP,
        ended.token_id: operators_pb2.TOKEN_STATE_REVOKED,
        usable.token_id: operators_pb2.TOKEN_STATE_USABLE,
    }
    assert {token_id: token.state for token_id, token in listed.items()} == states
    assert list(listed[used_up.token_id].node_ids) == [node.node_id]
    assert all(
        secret not in str(listed) for secret in (used_up.secret, ended.secret, usable.secret)
    )
    _, why, text = await refusal(central.enroll("e", ended))
    assert (why, "an operator revoked it" in text) == ("BAD_TOKEN", True)
    await late.query("0" * 64)
    kinds = [event.kind for event in central.rooms.journal.events()]
    assert kinds.count(EventKind.TOKEN_REVOKED) == 1
    unknown = operators_pb2.RevokeTokenRequest(token_id="lkt1.abc")
    assert (await refusal(central.operators.RevokeToken(unknown, timeout=20)))[:2] == (
        grpc.StatusCode.NOT_FOUND, "UNKNOWN_TOKEN"
    )  # fmt: skip


async def test_the_commands_say_it(
    central: Central, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CENTRAL_DATA_DIR", str(central.settings.data_dir))
    monkeypatch.setenv("CENTRAL_LISTEN__PORT", str(central.settings.listen.port))

    async def run(*arguments: str) -> tuple[int, str]:
        def command() -> int:
            with pytest.raises(SystemExit) as ended:
                main(list(arguments))
            return int(str(ended.value.code))

        return await asyncio.to_thread(command), capsys.readouterr().out

    code, text = await run("tokens", "create", "--uses", "3", "--json")
    assert code == 0
    made = json.loads(text)
    node = await central.enroll("site", JoinToken.parse(made["token"]))
    code, text = await run("tokens", "list")
    assert (code, f"{made['token_id']}  shared  usable  1 of 3" in text, node.node_id in text) == (
        0,
        True,
        True,
    ), text
    code, text = await run("nodes", "revoke", node.node_id)
    assert code == 0
    assert f"The 2 uses left of the token that it came with ({made['token_id']}) ended too." in text
    code, text = await run("nodes", "revoke", node.node_id, "--json")
    assert json.loads(text) == {"token_id": made["token_id"], "ended_uses": 0, "other_node_ids": []}
    code, text = await run("tokens", "list", "--json")
    (token,) = json.loads(text)
    assert (token["state"], token["used"], token["reason"]) == (
        "revoked",
        1,
        f"its node {node.node_id} was revoked",
    )
    code, text = await run("tokens", "create", "--readmit", node.node_id)
    assert code == 0
    assert (await central.enroll("site", JoinToken.parse(text.strip()))).node_id != node.node_id
    code, text = await run("tokens", "list", "--json")
    code, text = await run("tokens", "revoke", json.loads(text)[1]["token_id"])
    assert (code, "nobody joins with it any more. Nodes that came with it stay: site-" in text) == (
        0,
        True,
    ), text


async def test_guesses_are_slow_and_the_right_token_is_not(tmp_path: Path) -> None:
    async with harness.running_central(harness.make_settings(tmp_path)) as central:
        token = await central.token(uses=40)
        wrong = JoinToken(token.token_id, "wrong", token.ca_pem)
        answered: list[float] = []
        began = time.monotonic()

        async def guess() -> None:
            await refusal(central.enroll("g", wrong))
            answered.append(time.monotonic() - began)

        guesses = [asyncio.create_task(guess()) for _ in range(30)]
        await asyncio.sleep(0.5)
        honest = time.monotonic()
        await central.enroll("a", token)
        assert time.monotonic() - honest < 4, "from the same address, while others guess"
        while len(answered) < 6:
            await asyncio.sleep(0.05)
        assert len([at for at in answered if at < 0.9]) <= 5
        for task in guesses:
            task.cancel()
        await asyncio.gather(*guesses, return_exceptions=True)
