"""The client for ordinary code. `AsyncClient` is the same for asyncio."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import TypeVar, Unpack

import httpx
import stamina

from promptd_client import _admin_requests, _requests
from promptd_client._admin import Fleet, Keys, Tenants
from promptd_client._jobs import Files, Jobs
from promptd_client._peft import PeftFolder, read_content, read_peft_folder
from promptd_client._replies import error_of
from promptd_client._requests import Call, StreamCall
from promptd_client._retry import retry_hook, retry_limits
from promptd_client._stream import Stream
from promptd_client._uploads import Folders, UploadResult, progress_bar
from promptd_client.admin_models import Drain, UsageReport
from promptd_client.errors import ConnectionFailedError, PromptdError
from promptd_client.models import (
    ChatCompletion,
    ChatCompletionChunk,
    Classification,
    Completion,
    Embeddings,
    Evaluation,
    Model,
    Neighbor,
    Prompt,
    Tokenization,
)
from promptd_client.options import (
    ChatOptions,
    ClassifyOptions,
    CompletionOptions,
    Message,
    PromptOptions,
    TextInput,
)

T = TypeVar("T")
PromptList = list[Prompt]  # `list` is a method of Prompts
NameList = list[str]
ResultList = list[UploadResult]
NeighborRows = list[list[Neighbor]]


class Client:
    """A connection to one promptd server; safe to use from several threads.

    client = Client("http://127.0.0.1:8000")
    client.prompts.upload_peft("alice", "adapters/alice")
    print(client.complete("Dear customer,", model="alice", max_tokens=40).text)
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_seconds: float = 600.0,
        max_retries: int = 3,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Address a server, with or without `/v1` at the end.

        Without an address or a key: those of `PROMPTD_URL` (else http://127.0.0.1:8000) and `PROMPTD_API_KEY`.
        """
        self.base_url = _requests.base_address(base_url)
        self._http = httpx.Client(
            base_url=self.base_url,
            headers=_requests.headers(api_key),
            timeout=httpx.Timeout(timeout_seconds, connect=_requests.CONNECT_SECONDS),
            transport=transport,
        )
        self._retrying = stamina.RetryingCaller(**retry_limits(max_retries))
        self.prompts = Prompts(self)
        self.files = Files(self)
        self.jobs = Jobs(self)
        self.keys = Keys(self)
        self.tenants = Tenants(self)
        self.fleet = Fleet(self)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def complete(self, prompt: TextInput, **options: Unpack[CompletionOptions]) -> Completion:
        """Continue a text, token ids, or the named fields of the prompt's template."""
        return self.run(_requests.completion(prompt, options))

    def stream(self, prompt: TextInput, **options: Unpack[CompletionOptions]) -> Stream[Completion]:
        """Continue a text, event by event; the last event has no choices but the usage."""
        return self.open(_requests.completion_stream(prompt, options))

    def chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> ChatCompletion:
        """Answer a conversation."""
        return self.run(_requests.chat(messages, options))

    def stream_chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> Stream[ChatCompletionChunk]:
        """Answer a conversation, event by event."""
        return self.open(_requests.chat_stream(messages, options))

    def classify(self, text: TextInput, **options: Unpack[ClassifyOptions]) -> Classification:
        """Pick one of the prompt's labels for every text."""
        return self.run(_requests.classify(text, options))

    def embed(self, text: TextInput, **options: Unpack[PromptOptions]) -> Embeddings:
        """Make a vector of every text."""
        return self.run(_requests.embed(text, options))

    def models(self) -> list[Model]:
        """List base models and prompts."""
        return self.run(_requests.models())

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> Tokenization:
        """Split a text into the base model's tokens."""
        return self.run(_requests.tokenize(text, add_special_tokens))

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Join tokens to a text."""
        return self.run(_requests.detokenize(tokens))

    def erase_user(self, user: str) -> dict[str, int]:
        """Erase the prompts, files and jobs that belong to one end user; return how many of what went."""
        return self.run(_requests.erase_user(user))

    def usage(self, *, first_day: str | None = None, last_day: str | None = None) -> UsageReport:
        """Show what your tenant was served; days as 2026-11-21 in UTC, without them the last thirty."""
        return self.run(_admin_requests.usage("/v1/usage", None, first_day, last_day))

    def drain(self) -> Drain:
        """Make this one server say no to its load balancer; it serves on. Needs an admin's key."""
        return self.run(_admin_requests.drain("POST"))

    def get_drain(self) -> Drain:
        """Show how far a server is with leaving its load balancer."""
        return self.run(_admin_requests.drain("GET"))

    def undrain(self) -> Drain:
        """Let a drained server be ready again."""
        return self.run(_admin_requests.drain("DELETE"))

    def version(self) -> str:
        """Return the server's version."""
        return self.run(_requests.version())

    def is_ready(self) -> bool:
        """Return whether the server answers and takes requests; never raises for a server that does not."""
        try:
            self._send(self._request(_requests.ready()), is_stream=False)
        except (PromptdError, httpx.TransportError):
            return False
        return True

    def run(self, call: Call[T]) -> T:
        """Send one request, again where that is safe, and read its reply."""
        try:
            response = self._retrying(retry_hook(call.is_idempotent), self._send, self._request(call), is_stream=False)
        except httpx.TransportError as error:
            raise ConnectionFailedError(f"{self.base_url}: {error or type(error).__name__}") from error
        return call.parse(response)

    def open(self, call: StreamCall[T]) -> Stream[T]:
        """Send one request and return its stream, once the server has accepted it."""
        request = self._http.build_request(
            call.method,
            call.path,
            params=call.params,
            json=call.body,
            headers=_requests.routed(_requests.STREAM_HEADERS, call.body),
        )
        try:
            response = self._retrying(retry_hook(False), self._send, request, is_stream=True)
        except httpx.TransportError as error:
            raise ConnectionFailedError(f"{self.base_url}: {error or type(error).__name__}") from error
        return Stream(response, call)

    def _request(self, call: Call[T]) -> httpx.Request:
        return self._http.build_request(
            call.method,
            call.path,
            params=call.params,
            headers=_requests.routed(call.headers, call.body),
            json=call.body,
            content=call.content,
        )

    def _send(self, request: httpx.Request, *, is_stream: bool) -> httpx.Response:
        response = self._http.send(request, stream=is_stream)
        if response.is_success:
            return response
        try:
            response.read()
        finally:
            response.close()
        raise error_of(response)


class Prompts:
    """The caller's prompts, `client.prompts`."""

    def __init__(self, client: Client) -> None:
        self._run = client.run

    def list(self) -> PromptList:
        """List what the caller's names point to, then public prompts of others."""
        prompts: PromptList = []
        after: str | None = None
        while True:
            page = self._run(_requests.list_prompts(after))
            prompts += page.data
            if not page.has_more or not page.data:
                return prompts
            after = page.data[-1].id

    def get(self, ref: str) -> Prompt:
        """Read one record: `name`, `name@3` or `name@sha256:…`."""
        return self._run(_requests.get_prompt(ref))

    def versions(self, name: str) -> PromptList:
        """List every version of a name, newest first."""
        return self._run(_requests.prompt_versions(name))

    def content(self, ref: str, *, format: _requests.ContentFormat = "native") -> bytes:
        """Download a prompt: safetensors (`native`), or a zip archive of a PEFT folder (`peft`)."""
        return self._run(_requests.prompt_content(ref, format))

    def upload(
        self,
        name: str,
        content: bytes | str | Path,
        *,
        kind: str | None = None,
        num_virtual_tokens: int | None = None,
        behind: Sequence[str] = (),
        user: str | None = None,
        if_match: str | None = None,
        if_none_match: str | None = None,
    ) -> Prompt:
        """Publish a safetensors file (bytes or a path) as the newest version of a name.

        `behind` names prompts that it was learned behind, from the chain's beginning: they are served in front of it.
        `user` is the end user whom it belongs to, for `erase_user`.
        """
        data = read_content(content)
        return self._run(
            _requests.put_prompt(
                name,
                data,
                kind=kind,
                num_virtual_tokens=num_virtual_tokens,
                behind=behind,
                user=user,
                if_match=if_match,
                if_none_match=if_none_match,
            )
        )

    def upload_text(
        self,
        name: str,
        text: str,
        *,
        template: str | None = None,
        label_words: Mapping[str, str] | None = None,
        stop: Sequence[str] | None = None,
        default_sampling: Mapping[str, float] | None = None,
        user: str | None = None,
        if_match: str | None = None,
        if_none_match: str | None = None,
    ) -> Prompt:
        """Publish a plain text under a name: it stands in front of every input, its keys computed once for all.

        A prompt that was distilled from it may take its place later.
        """
        fields = {
            "template": template,
            "label_words": label_words,
            "stop": stop,
            "default_sampling": default_sampling,
        }
        return self._run(
            _requests.put_text(name, text, fields, user=user, if_match=if_match, if_none_match=if_none_match)
        )

    def upload_peft(
        self,
        name: str,
        folder: str | Path | PeftFolder,
        *,
        if_match: str | None = None,
        if_none_match: str | None = None,
    ) -> Prompt:
        """Publish a PEFT folder (adapter_config.json and adapter_model.safetensors) under a name."""
        files = read_peft_folder(folder)
        return self._run(_requests.put_peft(name, files, if_match=if_match, if_none_match=if_none_match))

    def upload_many(
        self,
        folders: Folders,
        *,
        jobs: int = 4,
        progress: bool = True,
        on_result: Callable[[UploadResult], None] | None = None,
    ) -> ResultList:
        """Publish many PEFT folders, `jobs` at once; one that fails stops no other. Results keep the order."""

        with progress_bar(len(folders), is_shown=progress) as move, ThreadPoolExecutor(jobs) as pool:
            uploads = [pool.submit(self._upload, name, Path(folder)) for name, folder in folders.items()]
            try:
                for upload in as_completed(uploads):
                    move(upload.result())
                    if on_result is not None:
                        on_result(upload.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [upload.result() for upload in uploads]

    def evaluate(
        self,
        ref: str,
        rows: _requests.Rows,
        *,
        answer_by: _requests.AnswerBy = "score",
        return_predictions: bool = False,
    ) -> Evaluation:
        """Measure a prompt on rows (or an uploaded file's id), beside the bare model and the majority class."""
        return self._run(
            _requests.evaluate_prompt(ref, rows, answer_by=answer_by, return_predictions=return_predictions)
        )

    def neighbors(self, ref: str, *, count: int = 5) -> NeighborRows:
        """Show a soft prompt in words: the `count` vocabulary entries nearest to each of its vectors, best first."""
        return self._run(_requests.prompt_neighbors(ref, count))

    def rollback(self, name: str, to: int | str) -> Prompt:
        """Point a name to an earlier version: its number, or `sha256:…`."""
        return self._run(_requests.rollback_prompt(name, to))

    def share(self, name: str, tenant: str) -> None:
        """Let another tenant use and read a prompt, as `owner/name`; all versions, those to come too."""
        self._run(_requests.share_prompt(name, tenant, is_shared=True))

    def unshare(self, name: str, tenant: str) -> None:
        """Share a prompt no longer, everywhere at once."""
        self._run(_requests.share_prompt(name, tenant, is_shared=False))

    def shares(self, name: str) -> NameList:
        """List the tenants that a prompt is shared with."""
        return self._run(_requests.list_shares(name))

    def erase(self, name: str) -> dict[str, int]:
        """Delete a name with all its versions and their bytes, in every server's memory too; return what went."""
        return self._run(_requests.erase_prompt(name))

    def delete(self, name: str) -> None:
        """Delete a name with all its versions. Their bytes go with a later clean-up."""
        self._run(_requests.delete_prompt(name))

    def _upload(self, name: str, folder: Path) -> UploadResult:
        try:
            return UploadResult(name, folder, prompt=self.upload_peft(name, folder))
        except PromptdError as error:
            return UploadResult(name, folder, error=error)
