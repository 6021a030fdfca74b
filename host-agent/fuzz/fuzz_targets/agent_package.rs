#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| host_agent::fuzzing::agent_package(data));
