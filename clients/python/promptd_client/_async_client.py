"""The client for asyncio. `Client` is the same for ordinary code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar, Unpack

import anyio
import anyio.to_thread
import httpx
import stamina

from promptd_client import _admin_requests, _requests
from promptd_client._async_admin import AsyncFleet, AsyncKeys, AsyncTenants
from promptd_client._async_jobs import AsyncFiles, AsyncJobs
from promptd_client._peft import PeftFolder, read_content, read_peft_folder
from promptd_client._replies import error_of
from promptd_client._requests import Call, StreamCall
from promptd_client._retry import retry_hook, retry_limits
from promptd_client._stream import AsyncStream
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


class AsyncClient:
    """A connection to one promptd server, for one event loop.

    async with AsyncClient("http://127.0.0.1:8000") as client:
        await client.prompts.upload_peft("alice", "adapters/alice")
        print((await client.complete("Dear customer,", model="alice", max_tokens=40)).text)
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_seconds: float = 600.0,
        max_retries: int = 3,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Address a server, with or without `/v1` at the end.

        Without an address or a key: those of `PROMPTD_URL` (else http://127.0.0.1:8000) and `PROMPTD_API_KEY`.
        """
        self.base_url = _requests.base_address(base_url)
        self._http = httpx.AsyncClient(
            base_url=self.base_url,
            headers=_requests.headers(api_key),
            timeout=httpx.Timeout(timeout_seconds, connect=_requests.CONNECT_SECONDS),
            transport=transport,
        )
        self._retrying = stamina.AsyncRetryingCaller(**retry_limits(max_retries))
        self.prompts = AsyncPrompts(self)
        self.files = AsyncFiles(self)
        self.jobs = AsyncJobs(self)
        self.keys = AsyncKeys(self)
        self.tenants = AsyncTenants(self)
        self.fleet = AsyncFleet(self)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def complete(self, prompt: TextInput, **options: Unpack[CompletionOptions]) -> Completion:
        """Continue a text, token ids, or the named fields of the prompt's template."""
        return await self.run(_requests.completion(prompt, options))

    async def stream(self, prompt: TextInput, **options: Unpack[CompletionOptions]) -> AsyncStream[Completion]:
        """Continue a text, event by event; the last event has no choices but the usage."""
        return await self.open(_requests.completion_stream(prompt, options))

    async def chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> ChatCompletion:
        """Answer a conversation."""
        return await self.run(_requests.chat(messages, options))

    async def stream_chat(
        self, messages: Sequence[Message], **options: Unpack[ChatOptions]
    ) -> AsyncStream[ChatCompletionChunk]:
        """Answer a conversation, event by event."""
        return await self.open(_requests.chat_stream(messages, options))

    async def classify(self, text: TextInput, **options: Unpack[ClassifyOptions]) -> Classification:
        """Pick one of the prompt's labels for every text."""
        return await self.run(_requests.classify(text, options))

    async def embed(self, text: TextInput, **options: Unpack[PromptOptions]) -> Embeddings:
        """Make a vector of every text."""
        return await self.run(_requests.embed(text, options))

    async def models(self) -> list[Model]:
        """List base models and prompts."""
        return await self.run(_requests.models())

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> Tokenization:
        """Split a text into the base model's tokens."""
        return await self.run(_requests.tokenize(text, add_special_tokens))

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """Join tokens to a text."""
        return await self.run(_requests.detokenize(tokens))

    async def erase_user(self, user: str) -> dict[str, int]:
        """Erase the prompts, files and jobs that belong to one end user; return how many of what went."""
        return await self.run(_requests.erase_user(user))

    async def usage(self, *, first_day: str | None = None, last_day: str | None = None) -> UsageReport:
        """Show what your tenant was served; days as 2026-11-21 in UTC, without them the last thirty."""
        return await self.run(_admin_requests.usage("/v1/usage", None, first_day, last_day))

    async def drain(self) -> Drain:
        """Make this one server say no to its load balancer; it serves on. Needs an admin's key."""
        return await self.run(_admin_requests.drain("POST"))

    async def get_drain(self) -> Drain:
        """Show how far a server is with leaving its load balancer."""
        return await self.run(_admin_requests.drain("GET"))

    async def undrain(self) -> Drain:
        """Let a drained server be ready again."""
        return await self.run(_admin_requests.drain("DELETE"))

    async def version(self) -> str:
        """Return the server's version."""
        return await self.run(_requests.version())

    async def is_ready(self) -> bool:
        """Return whether the server answers and takes requests; never raises for a server that does not."""
        try:
            await self._send(self._request(_requests.ready()), is_stream=False)
        except (PromptdError, httpx.TransportError):
            return False
        return True

    async def run(self, call: Call[T]) -> T:
        """Send one request, again where that is safe, and read its reply."""
        try:
            response = await self._retrying(
                retry_hook(call.is_idempotent), self._send, self._request(call), is_stream=False
            )
        except httpx.TransportError as error:
            raise ConnectionFailedError(f"{self.base_url}: {error or type(error).__name__}") from error
        return call.parse(response)

    async def open(self, call: StreamCall[T]) -> AsyncStream[T]:
        """Send one request and return its stream, once the server has accepted it."""
        request = self._http.build_request(
            call.method,
            call.path,
            params=call.params,
            json=call.body,
            headers=_requests.routed(_requests.STREAM_HEADERS, call.body),
        )
        try:
            response = await self._retrying(retry_hook(False), self._send, request, is_stream=True)
        except httpx.TransportError as error:
            raise ConnectionFailedError(f"{self.base_url}: {error or type(error).__name__}") from error
        return AsyncStream(response, call)

    def _request(self, call: Call[T]) -> httpx.Request:
        return self._http.build_request(
            call.method,
            call.path,
            params=call.params,
            headers=_requests.routed(call.headers, call.body),
            json=call.body,
            content=call.content,
        )

    async def _send(self, request: httpx.Request, *, is_stream: bool) -> httpx.Response:
        response = await self._http.send(request, stream=is_stream)
        if response.is_success:
            return response
        try:
            await response.aread()
        finally:
            await response.aclose()
        raise error_of(response)


class AsyncPrompts:
    """The caller's prompts, `client.prompts`."""

    def __init__(self, client: AsyncClient) -> None:
        self._run = client.run

    async def list(self) -> PromptList:
        """List what the caller's names point to, then public prompts of others."""
        prompts: PromptList = []
        after: str | None = None
        while True:
            page = await self._run(_requests.list_prompts(after))
            prompts += page.data
            if not page.has_more or not page.data:
                return prompts
            after = page.data[-1].id

    async def get(self, ref: str) -> Prompt:
        """Read one record: `name`, `name@3` or `name@sha256:…`."""
        return await self._run(_requests.get_prompt(ref))

    async def versions(self, name: str) -> PromptList:
        """List every version of a name, newest first."""
        return await self._run(_requests.prompt_versions(name))

    async def content(self, ref: str, *, format: _requests.ContentFormat = "native") -> bytes:
        """Download a prompt: safetensors (`native`), or a zip archive of a PEFT folder (`peft`)."""
        return await self._run(_requests.prompt_content(ref, format))

    async def upload(
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
        data = await anyio.to_thread.run_sync(read_content, content)
        return await self._run(
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

    async def upload_text(
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
        return await self._run(
            _requests.put_text(name, text, fields, user=user, if_match=if_match, if_none_match=if_none_match)
        )

    async def upload_peft(
        self,
        name: str,
        folder: str | Path | PeftFolder,
        *,
        if_match: str | None = None,
        if_none_match: str | None = None,
    ) -> Prompt:
        """Publish a PEFT folder (adapter_config.json and adapter_model.safetensors) under a name."""
        files = await anyio.to_thread.run_sync(read_peft_folder, folder)
        return await self._run(_requests.put_peft(name, files, if_match=if_match, if_none_match=if_none_match))

    async def upload_many(
        self,
        folders: Folders,
        *,
        jobs: int = 4,
        progress: bool = True,
        on_result: Callable[[UploadResult], None] | None = None,
    ) -> ResultList:
        """Publish many PEFT folders, `jobs` at once; one that fails stops no other. Results keep the order."""

        results: dict[str, UploadResult] = {}
        limiter = anyio.Semaphore(jobs)

        async def one(name: str, folder: Path) -> None:
            async with limiter:
                results[name] = await self._upload(name, folder)
            move(results[name])
            if on_result is not None:
                on_result(results[name])

        with progress_bar(len(folders), is_shown=progress) as move:
            async with anyio.create_task_group() as uploads:
                for name, folder in folders.items():
                    uploads.start_soon(one, name, Path(folder))
        return [results[name] for name in folders]

    async def evaluate(
        self,
        ref: str,
        rows: _requests.Rows,
        *,
        answer_by: _requests.AnswerBy = "score",
        return_predictions: bool = False,
    ) -> Evaluation:
        """Measure a prompt on rows (or an uploaded file's id), beside the bare model and the majority class."""
        return await self._run(
            _requests.evaluate_prompt(ref, rows, answer_by=answer_by, return_predictions=return_predictions)
        )

    async def neighbors(self, ref: str, *, count: int = 5) -> NeighborRows:
        """Show a soft prompt in words: the `count` vocabulary entries nearest to each of its vectors, best first."""
        return await self._run(_requests.prompt_neighbors(ref, count))

    async def rollback(self, name: str, to: int | str) -> Prompt:
        """Point a name to an earlier version: its number, or `sha256:…`."""
        return await self._run(_requests.rollback_prompt(name, to))

    async def share(self, name: str, tenant: str) -> None:
        """Let another tenant use and read a prompt, as `owner/name`; all versions, those to come too."""
        await self._run(_requests.share_prompt(name, tenant, is_shared=True))

    async def unshare(self, name: str, tenant: str) -> None:
        """Share a prompt no longer, everywhere at once."""
        await self._run(_requests.share_prompt(name, tenant, is_shared=False))

    async def shares(self, name: str) -> NameList:
        """List the tenants that a prompt is shared with."""
        return await self._run(_requests.list_shares(name))

    async def erase(self, name: str) -> dict[str, int]:
        """Delete a name with all its versions and their bytes, in every server's memory too; return what went."""
        return await self._run(_requests.erase_prompt(name))

    async def delete(self, name: str) -> None:
        """Delete a name with all its versions. Their bytes go with a later clean-up."""
        await self._run(_requests.delete_prompt(name))

    async def _upload(self, name: str, folder: Path) -> UploadResult:
        try:
            return UploadResult(name, folder, prompt=await self.upload_peft(name, folder))
        except PromptdError as error:
            return UploadResult(name, folder, error=error)
