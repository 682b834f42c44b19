"""Sinks: usage as events for metering and billing systems outside, at least once, each event under one id for ever.

An event is written to the outbox with the bytes that are sent, in the transaction that notes how far the facts have
been read. It leaves the outbox when the sink has answered with success.
"""
