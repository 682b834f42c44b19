"""The operator: turns Lorapool's objects into pods and reports their status.

It is level-triggered: handlers mark keys dirty, `observe` gathers what is known of a key (`world`), a pure function
plans (`decisions`), `effects` applies the plan. This folder holds the life of the process. The operator is never in a
request's path and sets no finalizers.
"""
