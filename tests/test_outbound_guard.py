"""The address guard: which addresses may be connected to."""

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import outbound
from outbound import Guard, parse

SPECIAL_4 = [
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
    *("192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
    *("224.0.0.0/4", "240.0.0.0/4"),
]
EDGES_4 = [
    (str(ip_address(int(ip_network(block)[at]) + step)), block, step == 0)
    for block in SPECIAL_4
    for at, step in ((0, 0), (-1, 0), (0, -1), (-1, 1))
    if 0 <= int(ip_network(block)[at]) + step < 2**32
]
NO_GLOBALS = [ip_network("192.88.99.0/24"), ip_network("192.0.0.0/24")]  # here ipaddress has exceptions, or none


def embedded(address: IPv4Address) -> list[IPv6Address]:
    """Return the IPv6 addresses that lead to an IPv4 address."""
    number = int(address)
    return [
        IPv6Address((0xFFFF << 32) | number),  # mapped
        IPv6Address(int(IPv6Address("64:ff9b::")) | number),  # NAT64
        IPv6Address((0x2002 << 112) | (number << 80)),  # 6to4
        IPv6Address((0x2002 << 112) | (number << 80) | 1),
    ]


@pytest.mark.parametrize(("text", "block", "within"), EDGES_4)
def test_the_edges_of_special_ipv4_blocks(text: str, block: str, within: bool) -> None:
    address = IPv4Address(text)
    expected = not within and not any(address in ip_network(other) for other in SPECIAL_4)
    forms: list[outbound.Address] = [address, *embedded(address)]
    assert {Guard().allows(form) for form in forms} == {expected}
    if not address.is_multicast and not any(address in block for block in NO_GLOBALS):
        assert address.is_global == expected


CLOSED_6 = [
    *("::", "::1", "::2", "::7f00:1", "::127.0.0.1", "::8.8.8.8", "::ffff:0:0", "::ffff:0:8.8.8.8", "::1:0:0:0"),
    *(
        "64:ff9a:ffff:ffff:ffff:ffff:ffff:ffff",
        "64:ff9b::1:0:0",
        "64:ff9b::1:808:808",
        "64:ff9b:1::",
        "64:ff9b:1:ffff::1",
        "100::",
        "100::1",
    ),
    *("64:ff9b::a9fe:a9fe", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::", "2002:a9fe:a9fe::", "2002:c0a8::1"),
    *("2001::", "2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:1ff:ffff::", "2001:2::1", "2001:10::1"),
    *("2001:20::1", "2001:db8::", "2001:db8::1", "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff", "3fff::", "3fff:fff::1"),
    *("1fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "4000::", "5f00::1", "fc00::", "fc00::1", "fd00::1", "fdff:ffff::1"),
    *("fd00:ec2::254", "fe00::1", "fe80::", "fe80::1", "fe80::1%lo", "febf:ffff::1", "fec0::1", "ff00::", "ff02::1"),
    *("ff0e::1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "::ffff:127.0.0.1", "::ffff:169.254.169.254"),
    *("::ffff:10.0.0.1", "::ffff:224.0.0.1", "::ffff:0.0.0.0", "::ffff:255.255.255.255"),
]
OPEN_6 = [
    *("2001:200::", "2001:200::1", "2001:4860:4860::8888", "2001:db7:ffff::1", "2001:db9::", "2000::", "2000::1"),
    *("2003::1", "2606:4700:4700::1111", "2a00:1450:4001::1", "3ffe::1", "3fff:1000::", "3fff:ffff::1"),
    *("::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1", "2001:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
]


@pytest.mark.parametrize("text", CLOSED_6)
def test_closed_ipv6_addresses(text: str) -> None:
    assert not Guard().allows(ip_address(text))


@pytest.mark.parametrize("text", OPEN_6)
def test_open_ipv6_addresses(text: str) -> None:
    address = IPv6Address(text)
    assert Guard().allows(address)
    inner = address.ipv4_mapped or address.sixtofour or address
    assert inner.is_global


@examples(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_ipv4_is_judged_as_python_does(number: int) -> None:
    address = IPv4Address(number)
    if not any(address in block for block in NO_GLOBALS):
        assert Guard().allows(address) == (address.is_global and not address.is_multicast)
    assert {Guard().allows(form) for form in embedded(address)} == {Guard().allows(address)}


@examples(deadline=None)
@given(
    st.integers(0, 2**128 - 1) | st.integers(0x2 << 124, (0x4 << 124) - 1) | st.integers(0x2001 << 112, 0x2003 << 112)
)
def test_ipv6_is_judged_no_milder_than_python_does(number: int) -> None:
    address = IPv6Address(number)
    if Guard().allows(address):
        assert (address.ipv4_mapped or address.sixtofour or address).is_global
        assert not address.is_multicast


def test_what_is_allowed_is_allowed_in_every_form() -> None:
    guard = Guard([ip_network("10.1.0.0/16"), ip_network("fd12::/16"), ip_network("fe80::/10")])
    for text in ("10.1.0.0", "10.1.255.255", "::ffff:10.1.2.3", "64:ff9b::a01:203", "2002:a01:203::"):
        assert guard.allows(ip_address(text)), text
    for text in ("10.0.255.255", "10.2.0.0", "127.0.0.1", "::1", "fd13::1", "::ffff:10.2.0.0", "::10.1.2.3"):
        assert not guard.allows(ip_address(text)), text
    for text in ("fd12::1", "fe80::1", "fe80::1%lo", "8.8.8.8", "2606:4700:4700::1111"):
        assert guard.allows(ip_address(text)), text


METADATA = ["169.254.169.254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::"]


@pytest.mark.parametrize("block", ["0.0.0.0/0", "169.254.0.0/16", "169.254.169.0/24", "169.254.169.254/31", "::/0"])
def test_a_block_does_not_allow_the_metadata_address(block: str) -> None:
    guard = Guard([ip_network(block)])
    assert not any(guard.allows(ip_address(text)) for text in (*METADATA, "fd00:ec2::254", "fd00:ec2::254%lo"))
    assert guard.allows(ip_address("169.254.169.255")) == (ip_address("169.254.169.255") in ip_network(block))


def test_the_metadata_address_is_allowed_by_itself() -> None:
    guard = Guard([ip_network("169.254.169.254/32")])
    assert all(guard.allows(ip_address(text)) for text in METADATA)
    assert not guard.allows(ip_address("169.254.169.253"))
    assert not guard.allows(ip_address("fd00:ec2::254"))
    six = Guard([ip_network("fd00::/8"), ip_network("fd00:ec2::254/128")])
    assert six.allows(ip_address("fd00:ec2::254"))
    assert six.allows(ip_address("fd00:ec2::253"))
    assert not any(six.allows(ip_address(text)) for text in METADATA)


def test_everything_is_everything() -> None:
    guard = Guard(everything=True)
    assert all(guard.allows(ip_address(text)) for text in (*METADATA, *CLOSED_6, *OPEN_6, "127.0.0.1"))


@pytest.mark.parametrize(
    ("text", "public", "local"),
    [
        (b"http://example.com/", True, True),
        (b"http://8.8.8.8/", True, True),
        (b"http://127.0.0.1/", False, True),
        (b"http://[::1]/", False, False),
        (b"http://[::ffff:127.0.0.1]/", False, True),
        (b"http://localhost/", False, True),
        (b"http://LOCALHOST./", False, True),
        (b"http://a.localhost/", False, True),
        (b"http://localhost.example/", True, True),
        (b"http://notlocalhost/", True, True),
        (b"http://169.254.169.254/latest", False, False),
    ],
)
def test_a_host_that_says_enough_is_judged_unresolved(text: bytes, public: bool, local: bool) -> None:
    assert Guard().allows_url(parse(text)) == public
    assert Guard([ip_network("127.0.0.0/8")]).allows_url(parse(text)) == local
