"""The server's end of Flower's process isolation: this very process is the run's ServerApp.

Where Flower would start a new process for it, ours submits the run, takes its task and holds its
``Grid``, so that one command in one terminal is the whole server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import httpx
from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import fab_to_proto, message_from_proto, run_from_proto
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
)
from flwr.supercore.constant import TASK_TOKEN_HEADER, TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
)
from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedtl.engines.flower_app import app_hash
from fedtl.engines.flower_gate import READY, TOKEN
from fedtl.engines.flower_runtime import ACQUIRE, GONE, Headers, beating
from fedtl.errors import EnvironmentFault

RETRY_SECONDS = 15.0
"""For this long a call to the SuperLink beside us is tried again before it counts as gone."""

_T = TypeVar("_T")


def _patient(alive: Callable[[], bool]) -> RetryInvoker:
    """Tries again what the transport lost; unlike Flower's own, bounded and without sending this
    process a signal."""
    return RetryInvoker(
        lambda: exponential(base_delay=0.1, max_delay=1),
        httpx.TransportError,
        max_tries=None,
        max_time=RETRY_SECONDS,
        should_giveup=lambda _: not alive(),
    )


class Submission(HttpGrid):
    """The ``Grid`` of a run that this process has submitted and now is the ServerApp of.

    Args:
        address: of the SuperLink on loopback.
        authority: PEM that its certificate is signed by.
        token: shown to the gate in front of it.
        alive: whether the SuperLink's process still runs.

    Raises (every method):
        EnvironmentFault: the SuperLink is gone.
    """

    def __init__(
        self, address: str, authority: bytes, token: str, alive: Callable[[], bool]
    ) -> None:
        super().__init__(address, root_certificates=authority, token=token)
        self._retry_invoker = _patient(alive)
        self._headers = Headers({TOKEN: token})
        self._announced: dict[str, tuple[ProtoMessage, ObjectTree]] = {}

    def _connect(self) -> None:
        """As Flower's, without its interceptors, which end the process on a refusal."""
        self._client = self._new_client(RuntimeHttpClient, self._headers)

    def _new_client(self, kind: Callable[..., _T], *interceptors: Any) -> _T:
        return kind.from_server_address(  # type: ignore[attr-defined,no-any-return]
            server_address=self._addr,
            insecure=False,
            root_certificates=self._cert,
            interceptors=interceptors,
            retry_invoker=self._retry_invoker,
        )

    @contextmanager
    def open(self, app: bytes, secret: bytes) -> Iterator[Submission]:
        """Submit the app, be its ServerApp, and report to Flower how it ended.

        Args:
            app: the bundle that the clients approved.
            secret: proves that this process may take the ServerApp's task.
        """
        fab = fab_to_proto(Fab(app_hash(app), app, {}))
        self._control(lambda client: client.StartRun(StartRunRequest(fab=fab)))
        executor = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={ACQUIRE})
        client = self._new_client(RuntimeHttpClient, self._headers, executor)
        try:
            request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
            acquired = _told(lambda: client.AcquireTask(request))
        finally:
            client.close()
        if not acquired.token:
            raise EnvironmentFault("Flower did not hand out the run that was just submitted")
        self._headers.headers[TASK_TOKEN_HEADER] = acquired.token
        task = _told(lambda: self._runtime_client.PullTaskInput(PullTaskInputRequest()))
        TaskIdentity.task_id = task.task_id
        TaskIdentity.run_id = task.run.run_id
        TaskIdentity.node_id = task.context.node_id
        self.set_run(run_from_proto(task.run))
        status = SubStatus.FAILED
        try:
            with beating(self._runtime_client):
                yield self
            status = SubStatus.COMPLETED
        finally:
            self._retry_invoker.max_tries = 1
            with suppress(*GONE):
                self._runtime_client.PushTaskOutput(PushTaskOutputRequest(sub_status=status))
            self.close()

    def register(self, public_pem: bytes, name: str) -> None:
        """Let nodes of this key in."""
        request = RegisterNodeRequest(public_key=public_pem, name=name)
        self._control(lambda client: client.RegisterNode(request))

    def reachable(self) -> bool:
        """Whether the SuperLink answers by now."""
        try:
            self._gate("/health").raise_for_status()
        except httpx.HTTPError:
            return False
        return True

    def open_gate(self) -> None:
        """From now on nodes are answered; before, they would be told that their key is unknown."""
        _told(lambda: self._gate(READY).raise_for_status())

    def _gate(self, path: str) -> httpx.Response:
        client = self._runtime_client._client
        return client.get(f"https://{self._addr}{path}", headers=self._headers.headers)

    def keys(self) -> dict[int, bytes]:
        """Nodes online now -> PEM of their public key."""
        return {node.node_id: node.public_key for node in self.get_nodes()}

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Nodes online now."""
        return _told(super().get_nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; their ids in the same order."""
        return _told(partial(super().push_messages, messages))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to these messages that are here as a whole by now.

        Flower announces a reply before its content is there, announces it once, and its own
        ``pull_messages`` then waits for the content for up to two hours. Here it is looked for
        again in the next call.
        """
        wanted = set(message_ids)
        known = {head.metadata.reply_to_message_id for head, _ in self._announced.values()}
        if asked := list(wanted - known):
            request = PullAppMessagesRequest(message_ids=asked)
            found = _told(lambda: self._runtime_client.PullMessages(request))
            trees = zip(found.messages_list, found.message_object_trees, strict=True)
            self._announced.update({head.metadata.message_id: (head, tree) for head, tree in trees})
        arrived = []
        for message_id, (head, tree) in list(self._announced.items()):
            if head.metadata.reply_to_message_id not in wanted:
                continue
            if message := _told(partial(self._complete, head, tree)):
                arrived.append(message)
                del self._announced[message_id]
        return arrived

    def _complete(self, head: ProtoMessage, tree: ObjectTree) -> Message | None:
        """An announced reply, None while its content is not here; an error where it is unusable."""
        metadata = message_from_proto(head).metadata  # the sender's own copy inside is not believed
        client, run_id = self._runtime_client, head.metadata.run_id
        pull = make_pull_object_fn_protobuf(client.PullObject, self.node, run_id)
        try:
            contents = {part.object_id: pull(part.object_id) for part in iterate_object_tree(tree)}
        except ObjectUnavailableError:
            return None
        except ObjectPullError:
            return _unusable(metadata, "its content was lost on the way")
        client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self.node, run_id=run_id, message_object_id=metadata.message_id
            )
        )
        try:
            message = inflate_object_from_contents(metadata.message_id, contents)
        except Exception as error:  # whatever a sender's bytes can make Flower's parser raise
            return _unusable(metadata, f"malformed ({type(error).__name__})")
        if not isinstance(message, Message):
            return _unusable(metadata, "not a message")
        message.__dict__["_metadata"] = metadata
        return message

    def _control(self, call: Callable[[ControlHttpClient], _T]) -> _T:
        client = self._new_client(ControlHttpClient, self._headers)
        try:
            return _told(lambda: call(client))
        finally:
            client.close()


def _unusable(metadata: Metadata, reason: str) -> Message:
    """What takes the place of a reply that cannot be read."""
    return make_message(metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, f"reply: {reason}"))


def _told(call: Callable[[], _T]) -> _T:
    """What a call to the SuperLink gives, or its failure in our words."""
    try:
        return call()
    except GONE as error:
        raise EnvironmentFault(
            "Flower's SuperLink does not answer any more",
            got=f"{type(error).__name__}: {error}"[:200],
            do="The last commit is kept: type 'fedtl server resume last'",
        ) from error
