"""`transformers serve` answers with what a checkpoint generates, to OpenAI's client and to `transformers chat`."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from transformers import AutoTokenizer

from support.loaded import greedy
from wina_convert import load

pytestmark = pytest.mark.slow

CLI = (sys.executable, "-c", "from transformers.cli.transformers import main; main()")
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
SAID = "Once upon a time"
TOKENS = 12


@dataclass(frozen=True)
class Served:
    """A checkpoint that a process serves, and what the model itself says behind SAID."""

    folder: Path
    url: str
    environment: dict[str, str]
    expected: str


@pytest.fixture(scope="module")
def served(wina_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("serve")
    folder = Path(shutil.copytree(wina_tiny, root / "wina"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (root / "home" / "hub").mkdir(parents=True)
    environment = os.environ | {"HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*CLI, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (root / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            answers(process, f"{url}/health", root / "log")
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokens = greedy(load(str(folder)), tokenizer(SAID, return_tensors="pt").input_ids, TOKENS)
            yield Served(folder, url, environment, tokenizer.decode(tokens[0], skip_special_tokens=True))
        finally:
            process.terminate()
            process.wait(30)


def answers(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until the server does."""
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        yield client


def test_a_client_of_openai_gets_what_the_model_generates(served: Served, client: openai.OpenAI):
    messages = [{"role": "user", "content": SAID}]
    asked = {"model": str(served.folder), "temperature": 0, "max_tokens": TOKENS}
    whole = client.chat.completions.create(messages=messages, **asked)
    assert whole.choices[0].message.content == served.expected
    assert whole.usage.completion_tokens == TOKENS
    parts = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(messages=messages, stream=True, **asked)
        if chunk.choices
    ]
    assert "".join(parts) == served.expected
    assert len(parts) > TOKENS / 2
    assert client.completions.create(prompt=SAID, **asked).choices[0].text == served.expected


def test_transformers_chat_shows_what_the_model_generates(served: Served):
    command = [*CLI, "chat", str(served.folder), served.url, f"max_new_tokens={TOKENS}", "do_sample=False"]
    environment = served.environment | {  # it goes through the Hub's client
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": served.url,
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    }
    said = subprocess.run(
        command, env=environment, input=f"{SAID}\nn\n!exit\n", capture_output=True, text=True, timeout=120, check=False
    )
    assert said.returncode == 0, said.stderr[-3000:]
    assert " ".join(served.expected.split()) in " ".join(said.stdout.split())
