//! Which test runs in which guest: everything that asks something of the kernel, without a container engine.
//! `kernels/run` takes the guests' plan from the test below, so that nothing is left out but by this table.

use std::fs;
use std::path::Path;

use super::common::expectations::{GUESTS, Kind};

/// Why a test cannot run, or need not, in a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// It starts a container engine, which a guest does not have.
    Engine,
    /// It compares with tshark, which is a hundred megabytes of libraries.
    Tshark,
    /// It needs systemd.
    Systemd,
    /// It measures milliseconds, which an emulated processor does not keep.
    Clock,
    /// It asks about the sources, which are the same everywhere.
    Sources,
    /// It kills the program at each of its system calls: about the ledger's order of writes, not about the kernel.
    EveryMoment,
    /// It imitates other kernels.
    Imitation,
    /// It asks about input, the policy, the ledger or the program's own processes, for which no kernel differs.
    NoKernel,
}

/// A test program, tests/NAME.rs.
struct Program {
    name: &'static str,
    runs: Runs,
}

enum Runs {
    /// In the guests with upstream MPTCP, but for the tests named. [`ELSEWHERE`] adds others.
    OnUpstream(&'static [(&'static str, Why)]),
    /// In no guest.
    Nowhere(Why),
}

/// Every test program, in the order in which a guest runs them.
const PROGRAMS: &[Program] = &[
    Program {
        name: "kernels",
        runs: Runs::OnUpstream(&[
            ("suite::every_test_is_in_the_table_and_the_plan_is", Why::Sources),
            ("document::docs_kernels_md_is_the_table", Why::Sources),
        ]),
    },
    Program { name: "scope_table", runs: Runs::OnUpstream(&[]) },
    Program {
        name: "upstream",
        runs: Runs::OnUpstream(&[
            ("a_first_apply_killed_at_any_moment_is_undone_by_release", Why::EveryMoment),
            ("a_first_apply_killed_at_any_moment_is_finished_by_the_next", Why::EveryMoment),
            ("a_change_killed_at_any_moment_is_undone_by_release", Why::EveryMoment),
            ("a_change_killed_at_any_moment_is_finished_by_the_next", Why::EveryMoment),
        ]),
    },
    Program {
        name: "routes",
        runs: Runs::OnUpstream(&[("crun_second_uplink_without_default_route_carries_the_failover", Why::Engine)]),
    },
    Program {
        name: "host_scope",
        runs: Runs::OnUpstream(&[
            ("runc_changes_a_host_value_and_restores_it_in_the_end", Why::Engine),
            ("runc_shares_an_equal_value_and_the_last_one_restores_it", Why::Engine),
            ("runc_is_refused_a_different_value_and_does_not_start", Why::Engine),
            ("runc_with_warn_starts_and_the_value_stays", Why::Engine),
            ("runc_with_override_changes_it_and_the_newest_remaining_claim_comes_back", Why::Engine),
            ("runc_linux_sysctl_that_differs_is_a_conflict_before_anything_is_applied", Why::Engine),
            ("a_hook_killed_at_any_moment_loses_no_original", Why::EveryMoment),
            ("a_release_killed_at_any_moment_is_finished_by_the_next", Why::EveryMoment),
            ("hooks_at_the_same_time_agree_on_one_value", Why::NoKernel),
            ("a_state_that_comes_late_leaves_less_of_the_deadline", Why::NoKernel),
            ("any_order_of_steps_ends_where_it_should", Why::NoKernel),
        ]),
    },
    Program { name: "doctor", runs: Runs::OnUpstream(&[]) },
    Program {
        name: "agent",
        runs: Runs::OnUpstream(&[
            ("an_agent_killed_among_200_changes_comes_to_the_same_state", Why::EveryMoment),
            ("whenever_it_is_killed_the_ledger_is_sound", Why::EveryMoment),
            ("a_minute_after_the_last_container_it_ends", Why::NoKernel),
            ("hooks_at_once_start_one_agent", Why::NoKernel),
            ("what_a_hook_has_started_an_agent_for_is_followed_when_it_ends", Why::NoKernel),
            ("status_on_a_terminal_stays_in_its_place", Why::NoKernel),
            ("a_lock_without_an_agent_is_not_taken_for_one", Why::NoKernel),
            ("whoever_changes_all_the_time_keeps_nobody_waiting", Why::NoKernel),
            ("while_crun_waits_for_it_the_agent_can_end_at_once", Why::Engine),
            ("a_poststop_hook_that_fails_leaves_the_others_an_agent", Why::Engine),
            ("hooks_and_the_agent_do_not_get_in_each_others_way", Why::NoKernel),
            ("whom_a_hook_works_on_stays_on_the_list", Why::NoKernel),
            ("under_a_users_systemd_the_unit_of_the_user_starts_it", Why::NoKernel),
            ("what_does_not_work_for_a_while_is_tried_until_it_does", Why::NoKernel),
            ("an_engines_agent_leaves_containers_of_the_users_other_engines_alone", Why::NoKernel),
            ("a_containers_process_that_is_killed_is_replaced_and_one_that_ends_is_reaped", Why::NoKernel),
            ("lost_messages_of_the_ledger_lose_nothing", Why::NoKernel),
            ("a_killed_containers_namespace_is_gone_at_once", Why::Clock),
            ("a_killed_containers_namespace_is_gone_at_once_while_the_agent_is_busy", Why::Clock),
            ("a_killed_containers_namespace_is_gone_at_once_while_the_agent_is_busy_inside", Why::Clock),
            ("an_address_is_an_endpoint_within_milliseconds", Why::Clock),
            ("an_address_without_a_way_out_waits_a_moment", Why::Clock),
        ]),
    },
    Program {
        name: "capture",
        runs: Runs::OnUpstream(&[
            ("real_traffic_is_read_as_tshark_reads_it", Why::Tshark),
            ("a_connection_that_is_ended_by_force", Why::Tshark),
            ("tags_in_both_directions", Why::Tshark),
            ("interfaces_without_a_link_layer", Why::Tshark),
            ("version_0_made_by_hand_is_read_as_tshark_reads_it", Why::Tshark),
            ("a_signal_ends_it_and_the_file_is_whole", Why::Tshark),
        ]),
    },
    Program {
        name: "bad_input",
        runs: Runs::OnUpstream(&[
            ("a_state_that_is_none", Why::NoKernel),
            ("a_state_that_lacks_something_or_has_it_wrong", Why::NoKernel),
            ("hostile_ids", Why::NoKernel),
            ("standard_input_that_never_ends_is_given_up", Why::NoKernel),
            ("standard_input_is_drained_whatever_else_is_wrong", Why::NoKernel),
            ("annotations_that_mean_nothing", Why::NoKernel),
            ("flags_limits_keys_and_values_that_cannot_be", Why::NoKernel),
            ("a_policy_with_mistakes", Why::NoKernel),
            ("a_policy_that_others_can_write", Why::NoKernel),
            ("a_containers_file_that_is_wrong", Why::NoKernel),
            ("a_state_directory_that_is_not_safe", Why::NoKernel),
            ("a_prepared_default_state_directory", Why::NoKernel),
            ("a_damaged_record_is_named_and_the_others_are_shown", Why::NoKernel),
            ("a_ledgers_file_that_others_could_have_written", Why::NoKernel),
            ("a_container_without_interfaces_is_shown_as_interrupted", Why::NoKernel),
            ("a_full_disk_undoes_everything", Why::NoKernel),
            ("a_read_only_state_directory", Why::NoKernel),
            ("limits_of_the_caller", Why::NoKernel),
            ("the_ledgers_files_are_for_root_alone", Why::NoKernel),
            ("command_lines_that_mean_nothing", Why::NoKernel),
            ("what_is_not_built_says_so", Why::NoKernel),
            ("every_verb_has_help_with_an_example", Why::NoKernel),
            ("the_environment_says_nothing", Why::NoKernel),
        ]),
    },
    Program { name: "repair", runs: Runs::Nowhere(Why::NoKernel) },
    Program { name: "old_kernels", runs: Runs::Nowhere(Why::Imitation) },
    Program { name: "policy", runs: Runs::Nowhere(Why::NoKernel) },
    Program { name: "privileges", runs: Runs::Nowhere(Why::NoKernel) },
    Program { name: "concurrency", runs: Runs::Nowhere(Why::NoKernel) },
    Program { name: "crash", runs: Runs::Nowhere(Why::NoKernel) },
    Program { name: "agent_engines", runs: Runs::Nowhere(Why::Engine) },
    Program { name: "two_uplinks", runs: Runs::Nowhere(Why::Engine) },
    Program { name: "lxc", runs: Runs::Nowhere(Why::Engine) },
    Program { name: "podman", runs: Runs::Nowhere(Why::Engine) },
    Program { name: "runc_crun", runs: Runs::Nowhere(Why::Engine) },
    Program { name: "systemd", runs: Runs::Nowhere(Why::Systemd) },
];

/// The kinds of a test that runs without upstream MPTCP, too.
const EVERYWHERE: &[Kind] = &[Kind::MptcpOrg, Kind::None];
const EITHER: &[Kind] = &[Kind::MptcpOrg];

/// Tests by program, and with which other kinds of MPTCP than upstream's they run. Those of `host_scope` ask for settings
/// and nothing else, those of `capture` make their packets themselves.
const ELSEWHERE: &[(&str, &[Kind], &[&str])] = &[
    (
        "kernels",
        EVERYWHERE,
        &[
            "the_kernel_is_as_the_table_says",
            "permissions_in_a_user_namespace",
            "without_mptcp_every_verb_ends_with_one_line",
            "without_mptcp_a_container_starts_where_the_policy_says_continue",
        ],
    ),
    (
        "kernels",
        EITHER,
        &[
            "either::a_backup_path_is_set_shown_and_taken_back",
            "either::the_agent_sets_a_flag_again_that_somebody_wiped",
            "either::the_doctor_names_a_path_manager_that_ignores_what_is_set",
            "either::a_setting_of_the_host_is_claimed_refused_and_restored",
        ],
    ),
    (
        "host_scope",
        EITHER,
        &[
            "a_present_value_is_claimed_without_a_write_and_holds_others",
            "a_dead_holder_holds_nothing",
            "a_foreign_change_is_shown_and_left_alone",
            "dry_run_names_the_holder_and_writes_nothing",
            "release_by_hand_lets_a_living_container_go",
            "an_overridden_value_that_comes_back_is_no_longer_overridden",
        ],
    ),
    (
        "capture",
        EVERYWHERE,
        &[
            "malformed_packets_are_said_and_survived",
            "count_and_duration_end_it",
            "a_reader_that_goes_away_ends_it_quietly",
            "it_ends_with_the_container",
            "while_it_listens_it_may_do_nothing",
        ],
    ),
];

/// How many tests a guest runs at once on its one processor: they wait for timers, too.
const AT_ONCE: u32 = 4;

/// Whether `source` has a test of that name; a module's tests are looked up in the module's file by the last part.
fn has_test(tests: &Path, program: &str, test: &str) -> bool {
    let function = format!("fn {}(", test.rsplit("::").next().unwrap_or(test));
    let mut files = vec![tests.join(format!("{program}.rs"))];
    let modules = fs::read_dir(tests.join(program)).into_iter().flatten();
    files.extend(modules.map(|entry| entry.expect("an entry of tests").path()));
    files.iter().any(|file| fs::read_to_string(file).is_ok_and(|source| source.contains(&function)))
}

/// Every file of tests is in the table, every name in it is a test. It prints the plan: lines `plan KIND PROGRAM
/// ARGUMENTS...`, by which `kernels/run` has the guests run the programs, and `guest NAME KIND`.
#[test]
fn every_test_is_in_the_table_and_the_plan_is() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    for entry in fs::read_dir(&tests).expect("the directory of tests") {
        let path = entry.expect("an entry of tests").path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.file_stem().expect("a name").to_string_lossy();
            assert!(PROGRAMS.iter().any(|program| program.name == name), "{name} is not in the table of the guests");
        }
    }
    for guest in GUESTS {
        println!("guest {} {}", guest.debian, guest.kind.name());
    }
    for program in PROGRAMS {
        assert!(tests.join(format!("{}.rs", program.name)).exists(), "there is no tests/{}.rs", program.name);
        match program.runs {
            Runs::OnUpstream(left_out) => {
                let mut arguments = format!("--test-threads={AT_ONCE} --exact");
                for (test, _) in left_out {
                    assert!(has_test(&tests, program.name, test), "there is no test {}::{test}", program.name);
                    arguments += &format!(" --skip {test}");
                }
                println!("plan {} {} {arguments}", Kind::Upstream.name(), program.name);
            }
            Runs::Nowhere(why) => println!("nowhere {}: {why:?}", program.name),
        }
    }
    for &(program, _, names) in ELSEWHERE {
        for test in names {
            assert!(has_test(&tests, program, test), "there is no test {program}::{test}");
        }
    }
    for kind in EVERYWHERE {
        for Program { name, .. } in PROGRAMS {
            let of_both = ELSEWHERE.iter().filter(|(program, kinds, _)| program == name && kinds.contains(kind));
            let names: Vec<&str> = of_both.flat_map(|(_, _, names)| *names).copied().collect();
            if !names.is_empty() {
                println!("plan {} {name} --test-threads={AT_ONCE} --exact {}", kind.name(), names.join(" "));
            }
        }
    }
}
