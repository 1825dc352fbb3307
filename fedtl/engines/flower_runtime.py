"""The client's end of Flower's process isolation: our own process, which stays.

Where Flower would start a new process for every message, ``Resident`` fetches messages from the
SuperNode on loopback and hands their content to a node object, so that imports, trunk and features
are loaded once. No code that came over the wire is ever unpacked, installed or run.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto
from flwr.proto.fab_pb2 import Fab
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TASK_TOKEN_HEADER, TaskType
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    pull_and_inflate_object_from_tree,
)
from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from flwr.supernode.runtime.run_clientapp import push_message

from fedtl.engines.exchange import Answering
from fedtl.engines.flower_app import app_hash
from fedtl.engines.flower_client import KINDS, read_message, write_record
from fedtl.engines.flower_processes import PULL_SECONDS
from fedtl.errors import InputError

ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
GONE = (httpx.HTTPError, RunNotRunningException)
"""What Flower's clients raise where the other end is gone or does not know us any more."""

POLL_SECONDS = 0.1
BEAT_SECONDS = 10.0
"""Between signs of life of a task; Flower gives it up after 30 s to 60 s without."""


class Headers:
    """Adds headers to every request; they may change while the client lives."""

    def __init__(self, headers: dict[str, str]) -> None:
        self.headers = headers

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Called by Flower's client."""
        context.request.headers.update(self.headers)
        return call_next(context)


@contextmanager
def beating(client: RuntimeHttpClient) -> Iterator[None]:
    """Show Flower that the task at hand is alive, however long it takes."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT_SECONDS):
            with suppress(*GONE):
                client.SendTaskHeartbeat(SendTaskHeartbeatRequest())

    thread = threading.Thread(target=beat, name="task heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Resident:
    """The ClientApp's executor that stays: imports, trunk and features are loaded once.

    Args:
        port: of the SuperNode's interface on loopback.
        secret: proves that this process may take its tasks.
        app_sha256: of the one app whose messages are answered.
        node: gives the answers.
        refused: told the hash of an app that was not.
    """

    def __init__(
        self,
        port: int,
        secret: bytes,
        app_sha256: str,
        node: Answering,
        refused: Callable[[str], None],
    ) -> None:
        self._headers = Headers({})
        self._client = RuntimeHttpClient.from_server_address(
            server_address=f"127.0.0.1:{port}",
            insecure=True,
            root_certificates=None,
            interceptors=[
                self._headers,
                SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={ACQUIRE}),
            ],
        )
        self._app_sha256, self._node, self._refused = app_sha256, node, refused

    def serve(self, stop: threading.Event) -> None:
        """Answer messages until told to stop; while no SuperNode runs, wait for one."""
        request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        while not stop.is_set():
            with suppress(*GONE):
                acquired = self._client.AcquireTask(request)
                if acquired.token:
                    self._headers.headers[TASK_TOKEN_HEADER] = acquired.token
                    self._work()
            self._headers.headers.clear()
            stop.wait(POLL_SECONDS)
        self._client.close()

    def _work(self) -> None:
        """One task: fetch its message, answer it, hand the answer over.

        A task that cannot be answered is not reported as failed but left alone: the SuperNode then
        answers in its place within a minute, where after a report it would wait for ever.
        """
        try:
            with beating(self._client):
                message, fab, context = self._fetch()
                push_message(self._client, self._reply(message, fab), context)
        except (ObjectPullError, ObjectPushError, RuntimeError, TypeError, ValueError) as error:
            logging.getLogger("fedtl").warning("a message was lost here: %s", error)
        else:
            done = PushTaskOutputRequest(sub_status=SubStatus.COMPLETED)
            self._client.PushTaskOutput(done)

    def _fetch(self) -> tuple[Message, Fab, Context]:
        """The task's message with all its content, the app it belongs to, and where it came to."""
        task = self._client.PullTaskInput(PullTaskInputRequest())
        context = context_from_proto(task.context)
        TaskIdentity.task_id = task.task_id
        TaskIdentity.run_id = task.run.run_id
        TaskIdentity.node_id = context.node_id
        found = self._client.PullMessages(PullAppMessagesRequest())
        if not found.messages_list:
            raise RuntimeError("a task without a message")
        (tree,), node = found.message_object_trees, Node(node_id=context.node_id)
        confirm = self._client.ConfirmMessageReceived
        message = pull_and_inflate_object_from_tree(
            tree,
            make_pull_object_fn_protobuf(self._client.PullObject, node, context.run_id),
            make_confirm_message_received_fn_protobuf(confirm, node, context.run_id),
            return_type=Message,
            max_time=PULL_SECONDS,
            max_tries_per_object=None,
            initial_backoff=POLL_SECONDS / 4,
            backoff_cap=POLL_SECONDS,
        )
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message, task.fab, context

    def _reply(self, message: Message, fab: Fab) -> Message:
        """The answer to a message, an error where its app is not the approved one."""
        if app_hash(fab.content) != self._app_sha256:
            self._refused(app_hash(fab.content))
            reason = "this node answers one approved app only, and this is another"
            return Message(Error(ErrorCode.INVALID_FAB, reason), reply_to=message)
        try:
            content, signature = read_message(message)
            kind = KINDS[message.metadata.message_type]
        except (InputError, KeyError):
            reason = "not a message of fedtl"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        return Message(write_record(self._node.answer(kind, content, signature)), reply_to=message)


def release_node(
    address: str, authority: bytes, key: ec.EllipticCurvePrivateKey, node_id: int
) -> None:
    """Tell the server that a node of ours is gone, so that it need not wait for it to fall silent.

    For a node whose process died; where the server cannot be told, it finds out in a minute.
    """
    client = FleetHttpClient.from_server_address(
        address, False, authority, [NodeAuthHttpInterceptor(key, key.public_key())]
    )
    try:
        with suppress(*GONE):
            client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
    finally:
        client.close()
