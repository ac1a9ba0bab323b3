#!/usr/bin/env bash
# Sets up .venv, checks lint and format with ruff, and runs the tests; arguments go to pytest:
#
#   bash launch/test.sh                 all but the slow tests (under 10 minutes on 2 cores)
#   bash launch/test.sh -m quick        the quick tier: every room, without long compiles (under 2 minutes)
#   bash launch/test.sh --slow          all tests
#   bash launch/test.sh -k factorization
#
# All three always run; the exit status is that of the first that failed.

. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" test
status=0
ruff check . || status=$?
ruff format --check . || status=$((status ? status : $?))
python -m pytest "$@" || status=$((status ? status : $?))
exit "$status"
