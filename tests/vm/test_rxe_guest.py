"""The guest's RDMA device: active, at the packet size that other tests count on, and opened by this Python."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.rxe


def test_pyverbs_opens_the_active_device() -> None:
    from pyverbs import enums
    from pyverbs.device import Context, get_device_list

    assert [device.name for device in get_device_list()] == [b"rxe0"]
    with Context(name="rxe0") as device:
        port = device.query_port(1)
        assert port.state == enums.ibv_port_state.IBV_PORT_ACTIVE
        assert port.active_mtu == enums.ibv_mtu.IBV_MTU_4096
        gids = {str(device.query_gid(1, index)) for index in range(2)}
        assert "0000:0000:0000:0000:0000:ffff:0a00:0001" in gids
