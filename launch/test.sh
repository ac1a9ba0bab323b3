#!/usr/bin/env bash
# Sets up .venv and runs the tests; arguments go to pytest:
#
#   bash launch/test.sh                 all but the slow ones (under 12 minutes on 2 cores)
#   bash launch/test.sh --slow          everything
#   bash launch/test.sh -k factorization

. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" test
exec python -m pytest "$@"
