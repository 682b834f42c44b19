"""Simulates a day of a fleet with the decisions of the product itself: placement, spreading, scaling, slots, eviction.

Nothing is loaded and nothing is computed: a request takes a time, a load takes a time. `traffic` draws the requests,
`pod` is one runtime, `fleet` is one base with its gateways and the operator, `report` prints and plots.
"""
