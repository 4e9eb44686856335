"""Two clients of QEMU's own library at one intercepted monitor. Any failure is an exception."""

import asyncio
import os
import sys

from qemu.qmp import ExecuteError, QMPClient


async def refused(call, *words):
    try:
        await call
    except ExecuteError as error:
        assert error.error.error.class_ == "GenericError", error.error
        for word in words:
            assert word in str(error), (word, str(error))
    else:
        raise AssertionError("was not refused")


def node(name, file):
    return {"driver": "raw", "node-name": name, "read-only": True, "file": {"driver": "file", "filename": file}}


async def main(path):
    first, second = QMPClient("first"), QMPClient("second")
    await first.connect(path)
    await second.connect(path)
    assert first.greeting.QMP.capabilities == ["oob"], first.greeting
    assert (await first.execute("query-status"))["status"] == "running"
    with second.listener(["STOP", "RESUME"]) as events:
        await first.execute("stop")
        assert (await asyncio.wait_for(events.get(), 60))["event"] == "STOP"
        await second.execute("cont")
        assert (await asyncio.wait_for(events.get(), 60))["event"] == "RESUME"
    await refused(first.execute("blockdev-add", node("gone", "gone.img")), "gone.img")
    await first.execute("blockdev-add", node("data", "data.img"))
    # It enables `oob` where it is offered.
    await refused(first.execute("migrate-pause", oob=True), "postcopy")
    with open(os.devnull, "rb") as file:
        second.send_fd_scm(file.fileno())
        await second.execute("getfd", {"fdname": "null"})
    await first.disconnect()
    assert (await second.execute("query-status"))["status"] == "running"
    await second.disconnect()


asyncio.run(main(sys.argv[1]))
