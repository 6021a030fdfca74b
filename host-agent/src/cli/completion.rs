//! `host-agent completion`: shell scripts that complete verbs and flags, and ask
//! `host-agent names` for the names of instances, services and images.

use clap::{Command, CommandFactory as _};
use clap_complete::{Shell as Generator, generate};

use super::args::{CommandLine, Shell};
use super::error::CliError;
use super::exit::Exit;
use super::output;

/// Prints the script of `shell` to standard output.
pub fn print(shell: Shell) -> Result<Exit, CliError> {
    output::write(script(shell).as_bytes())?;
    Ok(Exit::Success)
}

fn script(shell: Shell) -> String {
    let generator = match shell {
        Shell::Bash => Generator::Bash,
        Shell::Zsh => Generator::Zsh,
        Shell::Fish => Generator::Fish,
    };
    let mut command = CommandLine::command();
    // Into memory, because `generate` panics on a write error.
    let mut script = Vec::new();
    generate(generator, &mut command, "host-agent", &mut script);
    let script = String::from_utf8(script).expect("scripts are text");
    command.build();
    let named = named(&command);
    match shell {
        Shell::Bash => script + &bash(&named),
        Shell::Zsh => zsh(script),
        Shell::Fish => script + &fish(&named),
    }
}

/// A verb with the words before it, and the kind of its first argument.
type Named = (String, &'static str);

/// Verbs whose first argument is the name of something.
fn named(command: &Command) -> Vec<Named> {
    let mut found = Vec::new();
    add(command, "", &mut found);
    found
}

fn add(command: &Command, words: &str, found: &mut Vec<Named>) {
    for verb in command.get_subcommands().filter(|it| !it.is_hide_set()) {
        let words = format!("{words} {}", verb.get_name());
        let first = verb.get_positionals().next();
        if let Some(kind) = first.and_then(|it| kind(it.get_id().as_str(), &words)) {
            found.push((words.trim().to_owned(), kind));
        }
        add(verb, &words, found);
    }
}

/// The kind of names for an argument.
fn kind(id: &str, words: &str) -> Option<&'static str> {
    match id {
        "instance" => Some("instances"),
        // Of `run` and `test` it is a file.
        "service" if words.starts_with(" service ") => Some("services"),
        "image" => Some("images"),
        "target_name" => Some("targets"),
        "source" if words == " cp" => Some("places"),
        _ => None,
    }
}

fn bash(named: &[Named]) -> String {
    let cases = named
        .iter()
        .map(|(words, kind)| format!("        \"{words}\") kind={kind} ;;\n"));
    let cases: String = cases.collect();
    format!(
        r#"
# Names, from the host agents that answer in time.
_host_agent_with_names() {{
    _host__agent "$@"
    local cur="${{COMP_WORDS[COMP_CWORD]}}" kind='' i words=() found=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        [[ ${{COMP_WORDS[i]}} == -* ]] || words+=("${{COMP_WORDS[i]}}")
    done
    case "${{words[*]}}" in
{cases}    esac
    [[ -n $kind && $cur != -* ]] || return 0
    [[ $kind != places ]] || compopt -o nospace 2>/dev/null
    mapfile -t found < <(compgen -W "$(host-agent names "$kind" 2>/dev/null)" -- "$cur")
    for i in "${{COMPREPLY[@]}}"; do
        [[ $i == [\<\[]* ]] || found+=("$i")
    done
    COMPREPLY=("${{found[@]}}")
}}
complete -F _host_agent_with_names -o bashdefault -o default host-agent
"#
    )
}

fn zsh(script: String) -> String {
    let mut lines = Vec::new();
    for line in script.lines() {
        // As in `':instance -- Instance, or DEPLOYMENT/INSTANCE:_default' \`.
        let kind = [
            ("':instance -- ", "instances"),
            ("':service -- Name of", "services"),
            ("':image -- ", "images"),
            ("':target_name -- ", "targets"),
            ("':source -- ", "places"),
        ];
        let kind = kind.iter().find(|(start, _)| line.starts_with(start));
        lines.push(match kind {
            Some((_, kind)) => {
                line.replacen(":_default'", &format!(":{{_host_agent_names {kind}}}'"), 1)
            }
            None => line.to_owned(),
        });
    }
    let function = "\n(( $+functions[_host_agent_names] )) ||\n_host_agent_names() {\n    \
        local -a found\n    found=(${(f)\"$(host-agent names $1 2>/dev/null)\"})\n    \
        compadd -a found\n    [[ $1 != places ]] || _files\n}\n";
    let script = lines.join("\n") + "\n";
    match script.find("\nif [ \"$funcstack[1]\"") {
        Some(end) => format!("{}{function}{}", &script[..end], &script[end..]),
        None => script + function,
    }
}

fn fish(named: &[Named]) -> String {
    let mut script = String::from("\n# Names, from the host agents that answer in time.\n");
    for (words, kind) in named {
        let seen: Vec<_> = words
            .split(' ')
            .map(|word| format!("__fish_seen_subcommand_from {word}"))
            .collect();
        script.push_str(&format!(
            "complete -c host-agent -n \"{}\" -a \"(host-agent names {kind} 2>/dev/null)\"\n",
            seen.join("; and ")
        ));
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    /// What bash completes in a line, whose last word is what was typed of it. A function stands
    /// for the program and prints the names of its kind.
    fn completed(line: &str) -> String {
        let mut bash = Command::new("bash")
            .args(["--norc", "--noprofile"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = bash.stdin.take().unwrap();
        input.write_all(script(Shell::Bash).as_bytes()).unwrap();
        let words: Vec<_> = line.split(' ').collect();
        let completion = format!(
            "\nhost-agent() {{ [ \"$1\" = names ] && printf '%s\\n' \"a-$2\" \"b-$2\"; }}\n\
             COMP_WORDS=({line}) COMP_CWORD={}\nset -- host-agent '{}' x\n\
             _host_agent_with_names \"$@\"\necho \"${{COMPREPLY[*]}}\"\n",
            words.len() - 1,
            words.last().unwrap(),
        );
        input.write_all(completion.as_bytes()).unwrap();
        drop(input);
        let output = bash.wait_with_output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    #[test]
    fn bash_completes_verbs_and_names() {
        for (line, expected) in [
            ("host-agent va", "validate"),
            ("host-agent exec a", "a-instances"),
            ("host-agent logs b", "b-instances"),
            ("host-agent service show a", "a-services"),
            ("host-agent image verify a", "a-images"),
            ("host-agent wait b", "b-targets"),
            ("host-agent cp a", "a-places"),
            // A second argument is none, and a directory neither.
            ("host-agent logs x a", ""),
            ("host-agent run a", ""),
        ] {
            assert_eq!(completed(line), expected, "{line}");
        }
    }

    #[test]
    fn every_script_has_the_verbs_and_asks_for_names() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = script(shell);
            for word in ["validate", "doctor", "heartbeat-limit", "host-agent names"] {
                assert!(script.contains(word), "{word} for {shell:?}");
            }
        }
        let zsh = script(Shell::Zsh);
        for kind in ["instances", "services", "images", "targets", "places"] {
            assert!(
                zsh.contains(&format!("{{_host_agent_names {kind}}}'")),
                "{kind}"
            );
        }
        assert!(script(Shell::Fish).contains(
            "\"__fish_seen_subcommand_from service; and __fish_seen_subcommand_from show\" -a \
             \"(host-agent names services"
        ));
    }
}
