#!/bin/bash
# The lab's hand on a machine that it has booted: commands from the second serial port, as image/init.sh takes them.
# It is no part of the product: whoever has that port is root here.

exec <"$1" >"$1" 2>&1
stty raw -echo
# Kernel messages would tear the answers.
dmesg -n 1
say() { echo "onequote-guest: $*"; }
say "ready"
while read -r number word rest; do
    [ -n "$word" ] || continue
    say "begin $number"
    case $word in
    sh)
        (eval "$rest") </dev/null
        status=$?
        ;;
    cat-ima)
        base64 /sys/kernel/security/ima/binary_runtime_measurements
        status=$?
        ;;
    poweroff | reboot)
        say "end $number 0"
        systemctl --no-block "$word"
        continue
        ;;
    guest)
        # guest SOCKET WORDS: asks the agent of a guest of this machine, at its console.
        coproc GUEST { socat -t 60 - "UNIX-CONNECT:${rest%% *}"; }
        echo "7 ${rest#* }" >&"${GUEST[1]}"
        status=65 inside=
        while read -r -t 60 line <&"${GUEST[0]}"; do
            line=${line%$'\r'}
            case $line in
            "onequote-guest: begin 7") inside=yes ;;
            "onequote-guest: end 7 "*)
                status=${line##* }
                break
                ;;
            *) [ -z "$inside" ] || echo "$line" ;;
            esac
        done
        kill "$GUEST_PID" 2>/dev/null
        wait "$GUEST_PID" 2>/dev/null
        ;;
    *)
        echo "unknown command $word"
        status=64
        ;;
    esac
    say "end $number $status"
done
