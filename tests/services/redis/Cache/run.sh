#!/bin/sh
# Starts Debian's redis-server on the role's endpoint. Every write is synced
# before it is acknowledged, so a restarted guest has lost no key.
exec redis-server \
    --bind 127.0.0.1 \
    --port "$REDIS_PORT" \
    --dir "$DATA" \
    --appendonly yes \
    --appendfsync always \
    --save "" \
    --daemonize no \
    --logfile ""
