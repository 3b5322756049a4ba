"""Mutants of how servers are found: several addresses in a URL, and what the nodes of a cluster announce."""

from mutants import Mutant

TOPOLOGY, ALONE, NODE = "redis_store/topology.py", "redis_store/alone.py", "redis_store/node.py"
SLOTS, CLUSTER, MEMBER = "redis_store/slots.py", "redis_store/cluster.py", "redis_store/member.py"
ADDRESSES = "tests/test_addresses.py"
NODES = "tests/test_cluster_addresses.py"

MUTANTS = [
    Mutant(
        ALONE,
        "        if batches is None:\n            self._topology.turn()",
        "        self._topology.turn()",
        (f"{ADDRESSES}::test_the_address_that_worked_last_is_tried_first",),
        "after a link that broke for a moment another server is tried first",
    ),
    Mutant(
        ALONE,
        " + topology.others * (ARRIVAL + RETRY[1])",
        "",
        (f"{ADDRESSES}::test_after_a_loss_others_get_the_time_to_try_all_addresses",),
        "a window is closed before an instance that tried a dead address has brought its ids back",
    ),
    Mutant(
        NODE,
        "if advice and advice not in self._advised:",
        "if advice:",
        (f"{ADDRESSES}::test_a_replica_is_passed_over_and_an_outage_is_told_once",),
        "an outage fills the log, once a try",
    ),
    Mutant(
        TOPOLOGY,
        "        if self._server.database:\n",
        "        if self._server.database and False:\n",
        (f"{ADDRESSES}::test_a_url_that_cannot_lead_to_a_cluster",),
        "a database number is passed over in silence",
    ),
    Mutant(
        SLOTS,
        '(named or announced or b"").decode() or asked.host',
        '(announced or b"").decode() or asked.host',
        (f"{NODES}::test_where_a_map_says_that_a_node_is",),
        "with TLS no certificate fits, as it is for the host name",
    ),
    Mutant(
        SLOTS,
        '"" if host == "?" else host',
        "host",
        (f"{NODES}::test_where_a_map_says_that_a_node_is",),
        "a look-up of ? is all that the log tells",
    ),
    Mutant(
        CLUSTER,
        "(owner := owners[slot]) is not None and owner.host and",
        "(owner := owners[slot]) is not None and",
        (f"{NODES}::test_a_node_that_is_to_announce_a_host_name_and_has_none",),
        "a look-up of an empty name is all that the log tells",
    ),
    Mutant(
        CLUSTER,
        'host=host, port=port, path="")',
        "host=host, port=port)",
        (f"{NODES}::test_a_node_that_is_reached_over_a_unix_socket",),
        "all nodes are taken to be behind one socket",
    ),
    Mutant(
        CLUSTER,
        "if place is None or (owner.own.tls and place not in self.members):",
        "if place is None:",
        (f"{NODES}::test_tls_to_all_nodes",),
        "for each slot that moves a connection is tried for which no certificate fits, and the log tells it",
    ),
    Mutant(
        CLUSTER,
        "(*map(self._owners.get, self.away), self.home.member)",
        "map(self._owners.get, self.away)",
        ("tests/test_cluster_map.py::test_why_nothing_can_be_taken_is_told_where_home_alone_is_away",),
        "/readyz does not say that a home without parts is away",
    ),
    Mutant(
        MEMBER,
        "if self._reached or not self._announced or advice_in(advise(error)):",
        "if not self._announced or advice_in(advise(error)):",
        (f"{NODES}::test_a_node_that_was_in_reach_is_only_away",),
        "for each node that is away operators are told to look for a mistake in what it announces",
    ),
    Mutant(
        MEMBER,
        "if self._reached or not self._announced or advice_in(advise(error)):",
        "if self._reached or not self._announced:",
        (f"{NODES}::test_a_certificate_that_is_not_for_what_nodes_announce",),
        "a certificate that does not fit is told as a network that is closed",
    ),
]
