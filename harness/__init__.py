"""What loop.py stands on: a room a file. Imports run in one direction, and nothing here imports loop.py.

    contract          what a fork changes; what the judge says of itself and of a run
    screen            messages, the live line, durations
    files             read without a hang, written whole, locked
    processes         children: started with a mark, watched, ended for certain
    interrupts        how a person stops a loop: Ctrl-C, SIGTERM, a file STOP
    repository        git
    environment       the machine: variables that a child gets, the installed packages, disk, data, devices
    ledger            rows, noise, the decision: pure functions
    store             one tag's folder: ledger, attempts, run folders, timeline
    opening           whatever a killed loop left behind is put right, once a session
    costs             what an agent's CLI says in its JSON mode: its words, tokens and dollars
    notify            tells a person, by a command of theirs
    agents            how each coding agent's CLI is called; random_search is the one without a model
    desk              a checkout that one agent edits: asked, it gives a proposal or says why there is none
    prompt            what an agent is told
    watch             whether a session has done enough, and what a person is told meanwhile
    proposers         the desks together, and the gate that an edit must pass
    bench             one run on this machine: measure(Job) -> Measurement, Crash or Unavailable
    fleet             where jobs run: submit(Job) -> Future
    ray_fleet         the same on Ray, on one machine or many; ray_driver is the process that has Ray, ray_node what a
                      node does with a job
    curve             the training curve in a run's log: the run's own words
    verdict           what stands beside a score: marks, and how and why it differs from its base
    report, picture   status, report and audit as text; progress.png and the curves
    page, morning     report.html: how text gets onto it; what it says. live_page rewrites it while a loop runs
    commands          arguments and exit codes
"""
