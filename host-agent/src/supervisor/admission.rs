//! Whether the instances that are asked for fit into the host. Pure, except for
//! [`Capacity::of_machine`].

use std::fs;
use std::thread::available_parallelism;

use super::spec::GuestSize;

/// Virtual processors for each processor of the host: guests share processors, which makes
/// them slower but ends none of them.
pub const OVERCOMMIT: u32 = 16;

/// MiB that a VMM process needs beyond the RAM of its guest, rounded up.
const OVERHEAD_MIB: u64 = 8;

/// Part of the host's memory that guests do not get, and its least size in MiB.
const RESERVED_PART: u64 = 16;
const RESERVED_MIB: u64 = 256;

/// What an operator lets the instances of a host take together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdmissionLimits {
    /// Virtual processors for each processor of the host.
    pub overcommit: u32,
    /// Most instances.
    pub instances: Option<u32>,
    /// Most memory in MiB, if the host has as much.
    pub memory_mib: Option<u64>,
}

impl Default for AdmissionLimits {
    fn default() -> Self {
        Self {
            overcommit: OVERCOMMIT,
            instances: None,
            memory_mib: None,
        }
    }
}

/// What instances take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Demand {
    instances: u64,
    memory_mib: u64,
    vcpus: u64,
}

/// What a host has for guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    instances: u64,
    memory_mib: u64,
    vcpus: u64,
}

/// Instances that do not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{} of {instances} instance{} fit: together they need {needed} {resource}, and {free} of the \
     {capacity} that the host has for guests are free", how_many(*fit), if *instances == 1 { "" } else { "s" }
)]
pub struct NoRoom {
    /// What is short.
    resource: &'static str,
    /// Number of instances that are asked for.
    instances: usize,
    /// How many of them would fit.
    fit: usize,
    needed: u64,
    free: u64,
    capacity: u64,
}

fn how_many(fit: usize) -> String {
    match fit {
        0 => "none".to_owned(),
        fit => fit.to_string(),
    }
}

impl Demand {
    /// What one instance takes.
    fn of(size: &GuestSize) -> Self {
        Self {
            instances: 1,
            memory_mib: u64::from(size.memory_mib) + OVERHEAD_MIB,
            vcpus: u64::from(size.vcpus),
        }
    }

    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            instances: self.instances + other.instances,
            memory_mib: self.memory_mib + other.memory_mib,
            vcpus: self.vcpus + other.vcpus,
        }
    }

    /// The rest without `other`, which is a part of it.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        Self {
            instances: self.instances.saturating_sub(other.instances),
            memory_mib: self.memory_mib.saturating_sub(other.memory_mib),
            vcpus: self.vcpus.saturating_sub(other.vcpus),
        }
    }

    /// What all of `sizes` take.
    pub fn sum<'a>(sizes: impl IntoIterator<Item = &'a GuestSize>) -> Self {
        let demands = sizes.into_iter().map(Self::of);
        demands.fold(Self::default(), Self::plus)
    }

    fn fits(self, capacity: Capacity) -> bool {
        self.memory_mib <= capacity.memory_mib
            && self.vcpus <= capacity.vcpus
            && self.instances <= capacity.instances
    }
}

impl Capacity {
    /// Of this machine within `limits`. One whose memory is not known has no bound. Blocking.
    pub fn of_machine(limits: AdmissionLimits) -> Self {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let processors = available_parallelism().map_or(1, |number| number.get() as u64);
        Self::of(total_mib(&meminfo).unwrap_or(u64::MAX), processors, limits)
    }

    fn of(memory_mib: u64, processors: u64, limits: AdmissionLimits) -> Self {
        let reserved = (memory_mib / RESERVED_PART).max(RESERVED_MIB);
        let memory_mib = memory_mib.saturating_sub(reserved);
        Self {
            instances: limits.instances.map_or(u64::MAX, u64::from),
            memory_mib: limits
                .memory_mib
                .map_or(memory_mib, |most| most.min(memory_mib)),
            vcpus: processors * u64::from(limits.overcommit),
        }
    }
}

/// `MemTotal` of `/proc/meminfo`, in MiB.
fn total_mib(meminfo: &str) -> Option<u64> {
    let mut lines = meminfo.lines();
    let line = lines.find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

/// Whether `wanted` fits beside what is `used`; else what is short and how many of them fit.
pub fn admit(capacity: Capacity, used: Demand, wanted: &[GuestSize]) -> Result<Demand, NoRoom> {
    let demand = Demand::sum(wanted);
    if used.plus(demand).fits(capacity) {
        return Ok(demand);
    }
    let mut taken = used;
    let fit = wanted.iter().take_while(|size| {
        taken = taken.plus(Demand::of(size));
        taken.fits(capacity)
    });
    let fit = fit.count();
    let (resource, needed, used, capacity) =
        if used.memory_mib + demand.memory_mib > capacity.memory_mib {
            let memory = (demand.memory_mib, used.memory_mib, capacity.memory_mib);
            ("MiB of memory", memory.0, memory.1, memory.2)
        } else if used.vcpus + demand.vcpus > capacity.vcpus {
            let vcpus = (demand.vcpus, used.vcpus, capacity.vcpus);
            ("virtual processors", vcpus.0, vcpus.1, vcpus.2)
        } else {
            let places = (demand.instances, used.instances, capacity.instances);
            ("places of the quota", places.0, places.1, places.2)
        };
    Err(NoRoom {
        resource,
        instances: wanted.len(),
        fit,
        needed,
        free: capacity.saturating_sub(used),
        capacity,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(vcpus: u8, memory_mib: u32) -> GuestSize {
        GuestSize {
            name: "test".into(),
            vcpus,
            memory_mib,
            resource_mib: 1,
        }
    }

    #[test]
    fn twenty_guests_do_not_fit_into_six_gibibytes() {
        let capacity = Capacity::of(5925, 1, AdmissionLimits::default());
        let small = size(1, 768);
        let seven = vec![small.clone(); 7];
        assert_eq!(
            admit(capacity, Demand::default(), &seven),
            Ok(Demand::sum(&seven))
        );
        let refused = admit(capacity, Demand::default(), &vec![small.clone(); 20]).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "7 of 20 instances fit: together they need 15520 MiB of memory, and 5555 of the 5555 \
             that the host has for guests are free"
        );
        let used = Demand::sum(&seven);
        let refused = admit(capacity, used, &[small]).unwrap_err().to_string();
        assert!(refused.starts_with("none of 1 instance fit: "), "{refused}");
        assert!(refused.contains("123 of the 5555"), "{refused}");
    }

    #[test]
    fn processors_are_shared_up_to_a_bound() {
        let capacity = Capacity::of(1 << 20, 1, AdmissionLimits::default());
        let eight = vec![size(8, 1); 2];
        assert!(admit(capacity, Demand::default(), &eight).is_ok());
        let refused = admit(capacity, Demand::sum(&eight), &[size(1, 1)]).unwrap_err();
        assert!(
            refused.to_string().contains("virtual processors"),
            "{refused}"
        );
    }

    #[test]
    fn an_operator_limits_instances_memory_and_processors() {
        let limits = AdmissionLimits {
            overcommit: 2,
            instances: Some(3),
            memory_mib: Some(1000),
        };
        let capacity = Capacity::of(1 << 20, 1, limits);
        let refused = |wanted: &[GuestSize]| {
            let refused = admit(capacity, Demand::default(), wanted).unwrap_err();
            refused.to_string()
        };
        assert!(admit(capacity, Demand::default(), &[size(2, 900)]).is_ok());
        let text = refused(&[size(1, 900), size(1, 900)]);
        assert!(
            text.contains("1 of 2 instances fit") && text.contains("the 1000"),
            "{text}"
        );
        assert!(refused(&[size(3, 1)]).contains("3 virtual processors"));
        let text = refused(&vec![size(0, 1); 4]);
        assert!(text.starts_with("3 of 4 instances fit"), "{text}");
        assert!(text.contains("4 places of the quota"), "{text}");
    }

    #[test]
    fn total_memory_is_read_from_proc() {
        let text = "MemTotal:        2048 kB\nMemFree: 1 kB\n";
        assert_eq!(total_mib(text), Some(2));
        assert_eq!(total_mib("MemFree: 1 kB\n"), None);
        assert!(Capacity::of_machine(AdmissionLimits::default()).memory_mib > 0);
    }
}
