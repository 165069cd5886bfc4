"""What loop.py stands on: a room a file. A room imports only rooms that stand above it; nothing imports loop.py.

    contract       what a fork changes; what the judge says of itself and of a run
    screen         messages, the live line, durations
    files          read without a hang, written whole, locked
    costs          what an agent's CLI prints in its JSON mode: its words, tokens and dollars
    notify         tells a person, by a command of theirs
    page           how text gets onto report.html, safely and cut to size
    processes      children: started with a mark, watched, ended for certain
    interrupts     how a person stops a loop: Ctrl-C, SIGTERM, a file STOP
    agents         how each coding agent's CLI is called
    random_search  the agent without a model: a program of its own
    ledger         rows, noise, the decision: pure functions
    curve          the training curve in a run's log: the run's own words
    environment    the machine: variables that a child gets, the installed packages, disk, data, devices
    repository     git
    picture        progress.png and the loss curves
    bench          one run on this machine: measure(Job, Place) -> Measurement, Crash or Unavailable
    store          one tag's folder: ledger, attempts, run folders, timeline
    desk           a checkout that one agent edits: asked, it gives a proposal or says why there is none
    fleet          where jobs run: submit(Job) -> Future
    ray_node       what a node of a Ray cluster does with a job
    ray_driver     the process that has Ray: a program of its own
    ray_fleet      the fleet on Ray, on one machine or many
    opening        the start of a session: what a killed loop, an agent or a person left behind is put right
    verdict        what stands beside a score: marks, and how and why it differs from its base
    prompt         what an agent is told
    proposers      the desks together, and the gate that an edit must pass
    watch          whether a session has done enough, and what a person is told meanwhile
    report         status, report and audit as text
    morning        what report.html says
    live_page      rewrites report.html while a loop runs
    commands       arguments and exit codes
    device         what a training run needs of its device: attention kernels, warm-up, what fits (imports torch)
"""
