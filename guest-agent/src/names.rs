//! The names that a guest has for itself. Pure.

use sha2::{Digest, Sha256};
use vmbus::text::clip;

/// Longest host name: one label of a domain name (RFC 1035, 2.3.4). The kernel cuts a host
/// name at 64 bytes.
const MAX_HOST_NAME: usize = 63;

/// The host name: the instance name without underscores. Of one that is too long, the start
/// and the number of the instance remain, and between them a digest that keeps it unique.
pub fn host_name(instance: &str) -> String {
    let name = instance.replace('_', "-");
    if name.len() <= MAX_HOST_NAME {
        return name;
    }
    let number = name.rfind("-IN-").map_or("", |at| &name[at..]);
    let digest: String = Sha256::digest(instance)[..4]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let end = format!("-{digest}{number}");
    // The host accepts only ASCII in names: a character is a byte.
    let start = clip(name.clone(), MAX_HOST_NAME.saturating_sub(end.len()));
    format!("{start}{end}")
}

/// Content of /etc/hosts: the instance name, and the host name made of it.
pub fn hosts_table(instance: &str) -> String {
    let host = host_name(instance);
    format!("127.0.0.1 localhost {host} {instance}\n::1 localhost\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_knows_its_host_name_and_its_instance_name() {
        for instance in ["Cache_IN_0", &format!("{}_IN_4294967295", "r".repeat(64))] {
            let host = host_name(instance);
            assert!(host.len() <= MAX_HOST_NAME && !host.contains('_'), "{host}");
            let table = hosts_table(instance);
            let names: Vec<&str> = table.split_whitespace().collect();
            assert!(names.contains(&host.as_str()), "{table}");
            assert!(names.contains(&instance), "{table}");
        }
        assert_eq!(host_name("Cache_IN_0"), "Cache-IN-0");
    }

    #[test]
    fn long_instance_names_have_different_host_names() {
        let name = |end: &str| host_name(&format!("{}{end}", "r".repeat(63)));
        let (first, other_role, other_number) = (name("a_IN_0"), name("b_IN_0"), name("a_IN_10"));
        assert!(first.ends_with("-IN-0") && other_number.ends_with("-IN-10"));
        assert_eq!((first.len(), other_number.len()), (63, 63));
        assert!(first != other_role && first != other_number);
    }
}
