//! `host-agent completion`: shell scripts that complete verbs and flags.

use clap::CommandFactory as _;
use clap_complete::{Shell as Generator, generate};

use super::args::{CommandLine, Shell};
use super::error::CliError;
use super::exit::Exit;
use super::output;

/// Prints the script of `shell` to standard output.
pub fn print(shell: Shell) -> Result<Exit, CliError> {
    output::write(&script(shell))?;
    Ok(Exit::Success)
}

fn script(shell: Shell) -> Vec<u8> {
    let generator = match shell {
        Shell::Bash => Generator::Bash,
        Shell::Zsh => Generator::Zsh,
        Shell::Fish => Generator::Fish,
    };
    // Into memory, because `generate` panics on a write error.
    let mut script = Vec::new();
    generate(
        generator,
        &mut CommandLine::command(),
        "host-agent",
        &mut script,
    );
    script
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    #[test]
    fn every_script_has_the_verbs_and_bash_completes_one() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = String::from_utf8(script(shell)).unwrap();
            for word in ["validate", "doctor", "heartbeat-limit"] {
                assert!(script.contains(word), "{word} for {shell:?}");
            }
        }
        let mut bash = Command::new("bash")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = bash.stdin.take().unwrap();
        input.write_all(&script(Shell::Bash)).unwrap();
        let completion = "\nCOMP_WORDS=(host-agent va) COMP_CWORD=1\n\
            _host__agent host-agent va host-agent\necho \"${COMPREPLY[*]}\"\n";
        input.write_all(completion.as_bytes()).unwrap();
        drop(input);
        let output = bash.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "validate\n");
    }
}
