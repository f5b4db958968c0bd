"""Hypothesis strategies for the bodies of requests."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.contract.served_ids.running import WEATHER

text = st.text(st.sampled_from("ab \n\tüß漢🙂<|>{}\"'"), max_size=8)


part = st.one_of(text, st.builds(lambda value: {"type": "text", "text": value}, text))


content = st.one_of(text, text, st.lists(part, min_size=1, max_size=3))


call = st.builds(
    lambda arguments: {
        "id": "c",
        "type": "function",
        "function": {"name": "weather", "arguments": arguments},
    },
    st.sampled_from(['{"at": "Oslo"}', "{}", "", "[1]", "not json"]),
)


message = st.one_of(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "user", "assistant", "system", "developer"]),
            "content": content,
        }
    ),
    st.fixed_dictionaries(
        {
            "role": st.just("assistant"),
            "content": st.one_of(st.none(), text),
            "tool_calls": st.lists(call, max_size=2),
        }
    ),
    st.fixed_dictionaries(
        {"role": st.just("tool"), "content": content, "tool_call_id": st.just("c")}
    ),
)


messages = st.one_of(
    st.lists(message, min_size=1, max_size=4),
    st.builds(
        lambda first, last: [first, {"role": "assistant", "content": "w"}, last], message, message
    ),
    st.builds(lambda value: [{"role": "user", "content": value}], content),
)


ending = st.sampled_from(
    [
        {},
        {},
        {"add_generation_prompt": False},
        {"continue_final_message": True, "add_generation_prompt": False},
    ]
)


options = st.fixed_dictionaries(
    {},
    optional={
        "stream": st.booleans(),
        "n": st.integers(1, 2),
        "stream_options": st.just({"include_usage": True}),
        "truncate_prompt_tokens": st.sampled_from([-1, 1, 5, 40]),
        "echo": st.booleans(),
    },
).map(
    lambda made: (
        made if made.get("stream") else {k: v for k, v in made.items() if k != "stream_options"}
    )
)


chat = st.builds(
    lambda said, how, end, more: {"messages": said, **how, **end, **more},
    messages,
    options,
    ending,
    st.fixed_dictionaries(
        {},
        optional={
            "tools": st.just([WEATHER]),
            "tool_choice": st.just("none"),
            "chat_template_kwargs": st.sampled_from(
                [{"enable_thinking": False}, {"enable_thinking": True}, {"x": 1}]
            ),
            "reasoning_effort": st.sampled_from(["none", "low"]),
            "add_special_tokens": st.booleans(),
        },
    ),
)


completion = st.builds(
    lambda prompt, how: {"prompt": prompt, **how},
    st.one_of(
        text.filter(len),
        st.lists(st.integers(0, 250), min_size=1, max_size=9),
        text.filter(len).map(lambda t: [t]),
    ),
    options,
)


correction = st.one_of(
    st.none(), st.sampled_from(["yes", "a\nb", "<tool_call>\n{}\n</tool_call>", "ü 漢"])
)
