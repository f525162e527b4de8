# Sourced by tools/quickstart and tools/test, which run in the repository's root: the one way to make .venv.
#
#   install_environment        the packages that a run needs
#   install_environment dev    also those that the tests need
#
# An incomplete environment of an interrupted call is made anew; a complete one is not changed.

PART_NAMES=() PART_SECONDS=()

# part NAME COMMAND...: prints what is done, does it, and prints how long it took.
part() {
    local name=$1 begun=$SECONDS
    shift
    printf '== %s\n' "$name"
    "$@"
    PART_NAMES+=("$name")
    PART_SECONDS+=($((SECONDS - begun)))
    printf '== %s: %d s\n\n' "$name" $((SECONDS - begun))
}

print_parts() {
    local index
    for index in "${!PART_NAMES[@]}"; do
        printf '%6d s  %s\n' "${PART_SECONDS[$index]}" "${PART_NAMES[$index]}"
    done
}

fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 2
}

# system_package NAMES WHY: installs packages of the system if possible, else names them. Their services are
# not started: RUNLEVEL=1.
system_package() {
    local names
    read -ra names <<<"$1"
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
        echo "installing the system's $1: $2"
        apt-get update -qq &&
            RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${names[@]}" \
                >/dev/null && return
    fi
    fail "$2: install the system's $1 and call again (Debian and Ubuntu: sudo apt-get install $1)"
}

# Sets PYTHON to an interpreter that is new enough.
find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            PYTHON=$name
            return
        fi
    done
    fail "Python 3.11 or newer is needed; python3 is $(python3 --version 2>&1 || true)"
}

prepare_system() {
    find_python
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || system_package python3-venv "Python cannot make environments"
    "$PYTHON" -c 'import ctypes; ctypes.CDLL("libibverbs.so.1")' 2>/dev/null ||
        system_package libibverbs1 "Mooncake needs libibverbs.so.1, also without InfiniBand"
}

# System packages for tools/slurmlab, and so for the tests on a Slurm cluster.
prepare_cluster() {
    local command
    for command in slurmctld slurmd slurmdbd sbatch munged mariadbd ip pkill ch-run; do
        PATH=$PATH:/usr/sbin:/sbin command -v "$command" >/dev/null && continue
        system_package "slurmctld slurmd slurmdbd slurm-client slurm-wlm-basic-plugins munge mariadb-server iproute2 procps \
charliecloud-runtime" "the tests start a Slurm cluster, and containers on it"
        return
    done
}

# System packages for the tests of the report's page.
prepare_browser() {
    command -v chromium >/dev/null || system_package chromium "the tests open a report in a browser"
}

# wanted LOCK: prints what identifies an environment from this file: its place, because it cannot be moved, the lock, and
# the package's part of pyproject.toml.
wanted() {
    printf '%s\n' "$PWD"
    { cat "$1" && sed '/^\[tool\./,$d' pyproject.toml; } | sha256sum
}

pip_install() {
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input --progress-bar off "$@" 2>&1 |
        { grep -v -e '^WARNING: ' -e 'dependency resolver' -e 'which is not installed' || true; }
    return "${PIPESTATUS[0]}"
}

# install_lock LOCK: installs a lock into .venv, unless the stamp says that it is installed already.
install_lock() {
    local lock=$1 stamp
    stamp=.venv/.installed-$(basename "$lock")
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(wanted "$lock")" ]; then
        echo "nothing to do"
        return
    fi
    if [ -e .venv/.unfinished ] || { [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" != "$PWD" ]; }; then
        echo "making .venv anew: it is unfinished or was moved"
        rm -rf .venv
    fi
    mkdir -p .venv
    touch .venv/.unfinished
    [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
    # torch first, with its dependencies on this system, so that no other package installs another one.
    mapfile -t torch < <(grep -E '^(torch|torchvision)==' "$lock")
    [ ${#torch[@]} -eq 0 ] || pip_install --constraint "$lock" "${torch[@]}"
    pip_install --no-deps --requirement "$lock"
    pip_install --no-deps --no-build-isolation --editable .
    wanted "$lock" >"$stamp"
    rm .venv/.unfinished
}

install_environment() {
    part "system" prepare_system
    mkdir -p .cache
    # Two calls at once: the second waits, and finds nothing to do.
    exec 9>.cache/install.lock
    flock 9
    part "packages, 6 GB" install_lock tools/requirements.lock
    [ "${1:-}" != dev ] || part "packages for the tests" install_lock tools/requirements-dev.lock
    exec 9>&-
}
