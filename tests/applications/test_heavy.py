"""The applications that take long to install or to run, or that need git, npm or a browser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_mcps_client_calls_tools(both_ways: Callable[..., Any]) -> None:
    assert both_ways("mcp_tools") == {
        "tools": ["add", "go_on", "long"],
        "added": 42,
        "told": "told",
        "done": 100_000,
        "progress": [[1, 2], [2, 2]],
        "said": ["half"],
        "read": "a note of ann",
    }


def test_openais_client_streams_and_uploads(both_ways: Callable[..., Any]) -> None:
    assert both_ways("openai_files", 240) == {
        "words": ["Hello", " wörld", ",", " this", " streams"],
        "kept": [150_000_000, "large.jsonl", "batch"],
        "whole": True,
        "refused": [404, "none"],
    }


def test_git_clones_and_pushes(both_ways: Callable[..., Any]) -> None:
    assert both_ways("git_http", 240) == {
        "same": True,
        "text": "hello again\n",
        "large": 60_000_000,
        "whole": "",
        "refused": [128, True],
    }


def test_gradios_client_calls_and_streams(both_ways: Callable[..., Any]) -> None:
    assert both_ways("gradio_client_calls", 120) == {
        "greeted": "Hello, Ann!",
        "counted": [1, 2, 3],
        "loud": True,
    }


def test_vite_replaces_a_module_in_the_page(both_ways: Callable[..., Any]) -> None:
    found = both_ways("vite_reload", 240)
    assert found == {"texts": ["before", "after"], "kept": True, "console": []}


def test_nexts_page_calls_its_server(both_ways: Callable[..., Any]) -> None:
    found = both_ways("next_dev", 240)
    counts = ["counted 41", "counted 41"]
    assert found == {"asked": "BASE", "counts": counts, "console": []}


def test_streamlits_page_shows_its_text(both_ways: Callable[..., Any]) -> None:
    assert both_ways("streamlit_page", 180) == {"title": "The shop", "console": []}


def test_jupyterlab_runs_a_cell(both_ways: Callable[..., Any]) -> None:
    output = ["six", "times", "seven", "ready?", "yes", "42"]
    found = both_ways("jupyter_cell", 180)
    assert found == {"output": output, "prompt": "[1]:", "ended": 204}
