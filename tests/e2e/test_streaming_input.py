"""Requests that go on, in a real engine: one policy for all that is said, errors for one alone.

Streaming-input sessions, and the turns of an answer that calls tools of the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import AsyncEngineArgs, SamplingParams
from vllm.engine.protocol import StreamingInput
from vllm.entrypoints.openai.responses.context import SimpleContext
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_semantic import register
from vllm_semantic.engine.refusal import KVPolicyError

from ..models import random_prompts
from ..platforms import on_gpu

SEMANTIC = {"name": "semantic", "sink_tokens": 8, "recent_tokens": 64, "semantic_tokens": 64}
STREAMING = {"name": "streaming", "sink_tokens": 32, "recent_tokens": 64}
CHUNKS = random_prompts([180, 180, 180, 180])
BESIDE = random_prompts([700])[0]
ANSWER = 20


class Sessions:
    """An engine and the loop that it lives in."""

    def __init__(self, model: str) -> None:
        register()
        self.runner = asyncio.Runner()
        arguments = AsyncEngineArgs(
            model,
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            block_size=32,
            max_model_len=2048,
            max_num_batched_tokens=256,
            max_num_seqs=4,
            kv_cache_memory_bytes=32 << 20,
            enable_prefix_caching=False,
            additional_config={"kv_policy": SEMANTIC | {"max_request_tokens": 256}},
            **({"gpu_memory_utilization": 0.3} if on_gpu() else {}),
        )
        self.engine = self.runner.run(self._start(arguments))
        self.number = 0

    async def _start(self, arguments: AsyncEngineArgs) -> AsyncLLM:
        return AsyncLLM.from_engine_args(arguments)

    def close(self) -> None:
        self.engine.shutdown()
        self.runner.close()

    def run(self, *answers: Coroutine[Any, Any, Any]) -> list[Any]:
        async def together() -> list[Any]:
            async with asyncio.timeout(120):
                return await asyncio.gather(*answers, return_exceptions=True)

        return self.runner.run(together())

    async def answer(self, prompt: Any, params: SamplingParams) -> list[int]:
        """The tokens of an answer, or of all answers of a session."""
        self.number += 1
        outputs = self.engine.generate(prompt, params, str(self.number))
        return [token async for output in outputs for token in output.outputs[0].token_ids]

    def session(self, of_session: Any, asked: list[Any]) -> Coroutine[Any, Any, list[int]]:
        """One that says so many chunks; ``...``: without parameters of its own."""

        async def chunks() -> AsyncGenerator[StreamingInput, None]:
            for tokens, each in zip(CHUNKS, asked, strict=False):
                # A list of its own: vLLM makes it longer.
                prompt = {"prompt_token_ids": list(tokens["prompt_token_ids"])}
                yield StreamingInput(prompt, None if each is ... else asking(each))

        return self.answer(chunks(), asking(of_session))


def asking(policy: Any, max_tokens: int = ANSWER) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=None if policy is None else {"kv_policy": policy},
    )


@pytest.fixture(scope="module")
def sessions(llama: str) -> Iterator[Sessions]:
    sessions = Sessions(llama)
    yield sessions
    sessions.close()


@pytest.fixture(scope="module")
def alone(sessions: Sessions) -> dict[str, list[int]]:
    """What a session answers under each policy, and a request that will run beside others."""
    (semantic,) = sessions.run(sessions.session(None, [...] * 4))
    (streaming,) = sessions.run(sessions.session(STREAMING, [...] * 4))
    (beside,) = sessions.run(sessions.answer(BESIDE, asking(None, 200)))
    assert len(semantic) == len(streaming) == 4 * ANSWER
    assert semantic != streaming
    return {"semantic": semantic, "streaming": streaming, "beside": beside}


def test_a_session_answers_as_alone(sessions: Sessions, alone: dict[str, list[int]]) -> None:
    answers = sessions.run(
        sessions.session(None, [...] * 4),
        sessions.session(STREAMING, [...] * 4),
        sessions.answer(BESIDE, asking(None, 200)),
    )
    assert answers == list(alone.values())


@pytest.mark.parametrize(
    ("of_session", "asked", "policy"),
    [
        (STREAMING, [None, ..., STREAMING, None], "streaming"),
        (None, [STREAMING, None, None, STREAMING], "streaming"),
        (None, [..., "semantic", None, SEMANTIC], "semantic"),
    ],
)
def test_all_chunks_are_under_one_policy(
    of_session: Any, asked: list[Any], policy: str, sessions: Sessions, alone: Any
) -> None:
    (answer,) = sessions.run(sessions.session(of_session, asked))
    assert answer == alone[policy]


@pytest.mark.parametrize(
    ("of_session", "asked", "message"),
    [
        (None, [..., STREAMING], "kv_policy .*streaming.* in a later chunk of a session"),
        (STREAMING, [..., "semantic"], "kv_policy .*semantic.* in a later chunk of a session"),
        (None, [..., "smart"], "kv_policy.name 'smart' is not served"),
        ("full", [...], "kv_policy {'name': 'full'} keeps"),
        (None, ["full"], "kv_policy {'name': 'full'} keeps"),
    ],
)
def test_a_refused_session_is_alone(
    of_session: Any, asked: list[Any], message: str, sessions: Sessions, alone: Any
) -> None:
    refused, beside = sessions.run(
        sessions.session(of_session, asked), sessions.answer(BESIDE, asking(None, 200))
    )
    assert isinstance(refused, KVPolicyError)
    with pytest.raises(KVPolicyError, match=message):
        raise refused
    assert beside == alone["beside"]
    (after,) = sessions.run(sessions.session(None, [...] * 4))
    assert after == alone["semantic"]


class CallsATool(SimpleContext):
    """What vLLM keeps of an answer whose first ``turns`` turns end in a call.

    These models were never taught to call; the loop, its parameters and its engine are vLLM's.
    """

    def __init__(self, prompt: dict[str, list[int]], turns: int) -> None:
        super().__init__()
        self.prompt, self.turns = prompt, turns
        self.answers: list[list[int]] = [[]]

    def append_output(self, output: Any) -> None:
        self.answers[-1] += output.outputs[0].token_ids

    def need_builtin_tool_call(self) -> bool:
        return len(self.answers) <= self.turns

    async def call_tool(self) -> list[Any]:
        return CHUNKS[len(self.answers)]["prompt_token_ids"]

    def append_tool_output(self, output: list[Any]) -> None:
        self.prompt["prompt_token_ids"] += self.answers[-1] + output
        self.answers.append([])


async def answer_with_tools(sessions: Sessions, context: CallsATool, policy: Any) -> list[int]:
    serving = SimpleNamespace(
        engine_client=sessions.engine,
        model_config=sessions.engine.model_config,
        _log_inputs=lambda *_, **__: None,
    )
    turns = OpenAIServingResponses._generate_with_builtin_tools(
        serving, f"tools-{id(context)}", context.prompt, asking(policy), context
    )
    return [context async for context in turns][-1].answers[-1]


def test_turns_with_tools_are_under_one_policy(sessions: Sessions) -> None:
    """Each turn asks anew, with a longer prompt: it answers as that prompt does alone."""
    for policy in (None, STREAMING):
        context = CallsATool({"prompt_token_ids": list(CHUNKS[0]["prompt_token_ids"])}, 3)
        (last,) = sessions.run(answer_with_tools(sessions, context, policy))
        assert len(context.prompt["prompt_token_ids"]) == 4 * 180 + 3 * ANSWER
        (alone,) = sessions.run(sessions.answer(context.prompt, asking(policy)))
        not_asked = None if policy else STREAMING
        (other,) = sessions.run(sessions.answer(context.prompt, asking(not_asked)))
        assert last == alone != other


def test_a_turn_that_may_not_go_on_is_alone(sessions: Sessions, alone: Any) -> None:
    """Under ``full`` the second turn is longer than this server lets a request hold."""
    context = CallsATool({"prompt_token_ids": list(CHUNKS[0]["prompt_token_ids"])}, 1)
    refused, beside = sessions.run(
        answer_with_tools(sessions, context, "full"), sessions.answer(BESIDE, asking(None, 200))
    )
    assert isinstance(refused, KVPolicyError)
    assert "keeps" in str(refused)
    assert len(context.answers[0]) == ANSWER
    assert beside == alone["beside"]
