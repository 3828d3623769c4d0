#!/usr/bin/env bash
# What a proxy costs: CPU-seconds of the proxy for 100,000 requests, Orca's beside Debian's nginx and HAProxy.
#
# Each proxy has one worker, pinned to one core; origin and load generator share the other. All three set the same
# request fields (X-Forwarded-For, -Proto, -Host, X-Request-Id), keep connections to the origin, and log no requests.
# Rounds are interleaved, so that whatever else the machine does falls on all of them; read the ratios before the
# figures.
#
#   bench/proxy.sh [ROUNDS] [SECONDS]      3 rounds of 5 seconds for each proxy and scenario
#   SCENARIOS="1k 100k" bench/proxy.sh     only these (1k, 100k, churn, ws)
#   PROXIES="orca haproxy" bench/proxy.sh  only these (the ratio is to the best of the others)
set -euo pipefail
export LC_ALL=C

rounds=${1:-3}
seconds=${2:-5}
scenarios=${SCENARIOS:-1k 100k churn ws}
proxies=${PROXIES:-orca nginx haproxy}
connections=${CONNECTIONS:-64}
repository=$(cd "$(dirname "$0")/.." && pwd)
proxy_core=1
other_core=0
origin=127.0.0.1:19000
echo_origin=127.0.0.1:19001

for tool in nginx:nginx-light haproxy:haproxy wrk:wrk taskset:util-linux; do
    if ! command -v "${tool%%:*}" >/dev/null && ! { [ "$(id -u)" = 0 ] && apt-get install -qq -y "${tool##*:}" >/dev/null; }; then
        echo "${tool%%:*} is missing; install it with: apt-get install ${tool##*:}" >&2
        exit 1
    fi
done
if [ "$(nproc)" -lt 2 ]; then
    echo "two cores are needed: one for the proxy and one for everything else" >&2
    exit 1
fi

cd "$repository"
if [ -z "${SKIP_BUILD:-}" ]; then
    cargo build --quiet --release -p orca-dataplane --example forward
    cargo build --quiet --release -p orca-bench --bin websocket
fi
built=${CARGO_TARGET_DIR:-$repository/target}/release

scratch=$(mktemp -d)
started=()
finish() {
    for process in "${started[@]}"; do kill "$process" 2>/dev/null || true; done
    wait
    rm -rf "$scratch"
}
trap finish EXIT
chmod 755 "$scratch"

# start CORE COMMAND...: leaves its process id in `last`
start() {
    local core=$1
    shift
    taskset -c "$core" "$@" >>"$scratch/output" 2>&1 &
    last=$!
    started+=("$last")
}

mkdir "$scratch/www"
head -c 1024 /dev/zero | tr '\0' x >"$scratch/www/1k"
head -c 102400 /dev/zero | tr '\0' x >"$scratch/www/100k"

# nginx_conf PORT BODY: what is common to the origin and the proxy
nginx_conf() {
    cat <<CONF
worker_processes 1;
daemon off;
pid $scratch/$1.pid;
error_log $scratch/$1.log;
events { worker_connections 8192; }
http {
    access_log off;
    client_body_temp_path $scratch/$1-body;
    proxy_temp_path $scratch/$1-proxy;
    fastcgi_temp_path $scratch/$1-fastcgi;
    uwsgi_temp_path $scratch/$1-uwsgi;
    scgi_temp_path $scratch/$1-scgi;
    keepalive_requests 1000000000;
    tcp_nodelay on;
    $2
}
CONF
}

nginx_conf 19000 "
    sendfile on;
    open_file_cache max=16 inactive=1h;
    open_file_cache_valid 1h;
    server { listen $origin backlog=4096; root $scratch/www; default_type application/octet-stream; }
" >"$scratch/origin.conf"

nginx_conf 18001 "
    map \$http_upgrade \$hop { default upgrade; '' ''; }
    upstream origin { server $origin; keepalive 512; keepalive_requests 1000000000; }
    upstream echo { server $echo_origin; }
    server {
        listen 127.0.0.1:18001 backlog=4096;
        proxy_http_version 1.1;
        proxy_buffers 16 16k;
        proxy_max_temp_file_size 0;
        proxy_set_header Host \$http_host;
        proxy_set_header Connection \$hop;
        proxy_set_header Upgrade \$http_upgrade;
        proxy_set_header X-Forwarded-For \$remote_addr;
        proxy_set_header X-Forwarded-Proto \$scheme;
        proxy_set_header X-Forwarded-Host \$http_host;
        proxy_set_header X-Request-Id \$request_id;
        location / { proxy_pass http://origin; }
        location /ws { proxy_pass http://echo; }
    }
" >"$scratch/nginx.conf"

cat >"$scratch/haproxy.conf" <<CONF
global
    nbthread 1
    maxconn 8192
defaults
    mode http
    http-reuse always
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    timeout tunnel 60s
    unique-id-format %[rand,hex]%[rand,hex]
frontend all
    bind 127.0.0.1:18002 backlog 4096
    http-request set-header X-Forwarded-For %[src]
    http-request set-header X-Forwarded-Proto http
    http-request set-header X-Forwarded-Host %[req.hdr(host)]
    http-request set-header X-Request-Id %[unique-id]
    use_backend echo if { path /ws }
    default_backend origin
backend origin
    server origin $origin
backend echo
    server echo $echo_origin
CONF

start $other_core nginx -p "$scratch" -c "$scratch/origin.conf"
if [[ " $scenarios " == *" ws "* ]]; then
    start $other_core "$built/websocket" serve $echo_origin
fi
declare -A address process
# Orca's example leads to one server, so WebSockets have a second of it.
address=([orca]=127.0.0.1:18000 [nginx]=127.0.0.1:18001 [haproxy]=127.0.0.1:18002)
for proxy in $proxies; do
    case $proxy in
    orca) start $proxy_core "$built/examples/forward" ${address[orca]} $origin ;;
    nginx) start $proxy_core nginx -p "$scratch" -c "$scratch/nginx.conf" ;;
    haproxy) start $proxy_core haproxy -db -f "$scratch/haproxy.conf" ;;
    *)
        # Another build of ours: PROXIES="orca other" other=PATH/TO/forward, to compare two.
        address[$proxy]=127.0.0.1:$((18100 + ${#started[@]}))
        start $proxy_core "${!proxy}" "${address[$proxy]}" $origin
        ;;
    esac
    process[$proxy]=$last
done
if [[ " $scenarios " == *" ws "* && " $proxies " == *" orca "* ]]; then
    start $proxy_core "$built/examples/forward" 127.0.0.1:18003 $echo_origin
    process[orca-ws]=$last
fi

for proxy in $proxies; do
    for _ in $(seq 100); do
        curl -fs -o /dev/null "http://${address[$proxy]}/1k" && continue 2
        sleep 0.1
    done
    echo "$proxy does not serve:" >&2
    cat "$scratch/output" >&2
    exit 1
done

# cpu PID: hundredths of a second that the process and its children have used, all threads
cpu() {
    local total=0 line
    for one in "$1" $(cat "/proc/$1/task/$1/children"); do
        line=$(<"/proc/$one/stat")
        # The name in parentheses may hold spaces; what follows it does not.
        set -- ${line##*) }
        total=$((total + ${12} + ${13}))
    done
    echo "$total"
}

# load SCENARIO PROXY: prints the number of requests that were answered
load() {
    local url=http://${address[$2]} output
    case $1 in
    1k) set -- "$url/1k" ;;
    100k) set -- "$url/100k" ;;
    churn) set -- -H 'Connection: close' "$url/1k" ;;
    ws)
        local at=${address[$2]}
        [ "$2" = orca ] && at=127.0.0.1:18003
        taskset -c $other_core "$built/websocket" load "$at" "$connections" "$seconds"
        return
        ;;
    esac
    output=$(taskset -c $other_core wrk -t1 -c"$connections" -d"${seconds}s" "$@")
    if grep -qE 'Non-2xx|Socket errors: connect [1-9]|timeout [1-9]' <<<"$output"; then
        echo "$output" >&2
        exit 1
    fi
    awk '/requests in/ { print $1 }' <<<"$output"
}

ticks=$(getconf CLK_TCK)
for round in $(seq "$rounds"); do
    for scenario in $scenarios; do
        for proxy in $proxies; do
            of=$proxy
            [ "$scenario-$proxy" = ws-orca ] && of=orca-ws
            before=$(cpu "${process[$of]}")
            answered=$(load "$scenario" "$proxy")
            after=$(cpu "${process[$of]}")
            awk -v s="$scenario" -v p="$proxy" -v c=$((after - before)) -v t="$ticks" -v n="$answered" -v w="$seconds" \
                'BEGIN { print s, p, c / t / n * 100000, n / w }' | tee -a "$scratch/results" |
                awk -v r="$round" '{ printf "round %d: %-6s %-8s %6.2f s per 100,000, %7d requests/s\n", r, $1, $2, $3, $4 }' >&2
        done
    done
done

echo
echo "CPU-seconds of the proxy per 100,000 requests (WebSocket: messages there and back), median of $rounds rounds of ${seconds} s;"
echo "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), $(nproc) cores, Linux $(uname -r | cut -d- -f1), $(date +%F), load $(cut -d' ' -f1 /proc/loadavg) at the end;"
echo "$(nginx -v 2>&1 | sed 's/.*: //'), HAProxy $(haproxy -v | awk 'NR == 1 { print $3 }'), $connections connections"
echo
awk -v scenarios="$scenarios" -v proxies="$proxies" '
    { n = ++count[$1, $2]; value[$1, $2, n] = $3 }
    function median(s, p,   i, j, n, t, v) {
        n = count[s, p]
        for (i = 1; i <= n; i++) v[i] = value[s, p, i]
        for (i = 2; i <= n; i++) for (j = i; j > 1 && v[j - 1] > v[j]; j--) { t = v[j]; v[j] = v[j - 1]; v[j - 1] = t }
        return n % 2 ? v[(n + 1) / 2] : (v[n / 2] + v[n / 2 + 1]) / 2
    }
    END {
        names["1k"] = "1 KiB keep-alive"; names["100k"] = "100 KiB keep-alive"
        names["churn"] = "1 KiB, a connection each"; names["ws"] = "WebSocket, 64 B"
        goal["1k"] = "≤ 1.0"; goal["100k"] = "≤ 0.8"
        ns = split(scenarios, s, " "); np = split(proxies, p, " ")
        printf "| scenario |"; for (i = 1; i <= np; i++) printf " %s |", p[i]
        print " first / best other | goal |"
        printf "|---|"; for (i = 1; i <= np; i++) printf "---|"; print "---|---|"
        for (j = 1; j <= ns; j++) {
            best = 0
            printf "| %s |", names[s[j]]
            for (i = 1; i <= np; i++) {
                m = median(s[j], p[i]); printf " %.2f |", m
                if (i > 1 && (!best || m < best)) best = m
            }
            printf " %s | %s |\n", best ? sprintf("%.2f", median(s[j], p[1]) / best) : "–", goal[s[j]] ? goal[s[j]] : "–"
        }
    }' "$scratch/results"
